{{- define "octavo.name" -}}
{{- if contains "octavo" .Release.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-octavo" .Release.Name | trunc 53 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "octavo.selector" -}}
app.kubernetes.io/name: octavo
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "octavo.labels" -}}
{{ include "octavo.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "octavo.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* A StatefulSet's name and a hash must fit into a label. */ -}}
{{- define "octavo.engines" -}}
{{ include "octavo.name" . | trunc 44 | trimSuffix "-" }}-engines
{{- end }}

{{- define "octavo.engines.selector" -}}
app.kubernetes.io/name: octavo-engine
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "octavo.engines.secret" -}}
{{ .Values.engines.existingSecret | default (include "octavo.engines" .) }}
{{- end }}

{{- define "octavo.engines.query" -}}
{{- $of := printf "{namespace=%q,service=%q}" .Release.Namespace (include "octavo.name" .) -}}
max(sum by (pod) (vllm:num_requests_running{{ $of }} + vllm:num_requests_waiting{{ $of }}))
{{- end }}

{{- define "octavo.redis" -}}
{{ include "octavo.name" . | trunc 44 | trimSuffix "-" }}-redis
{{- end }}

{{- define "octavo.redis.selector" -}}
app.kubernetes.io/name: octavo-redis
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "octavo.redis.url" -}}
{{- if .Values.redis.enabled }}redis://{{ include "octavo.redis" . }}:6379{{ else }}{{ .Values.redis.url }}{{ end }}
{{- end }}

{{- /* Labels of what is not a server: each selector has a name of its own, so that the Service finds servers only. */ -}}
{{- define "octavo.labels.common" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "octavo.kv.volume" -}}
- name: kv
  {{- if .Values.kvDisk.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .Values.kvDisk.existingClaim | quote }}
  {{- else }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .Values.kvDisk.storageClassName }}
        storageClassName: {{ . | quote }}
        {{- end }}
        resources:
          requests: {storage: {{ .Values.kvDisk.volume | quote }}}
  {{- end }}
{{- end }}
