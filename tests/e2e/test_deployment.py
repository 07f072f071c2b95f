"""What is in deploy/, with the real programs where they are installed, and the settings that it names."""

import base64
import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from octavo.config import EngineConfig
from octavo.network.run import DRAIN
from octavo.server.config import ServerConfig
from octavo.settings import settings_of
from programs import program, running
from server_process import ServerProcess, free_port

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SETTINGS = {f"OCTAVO_{name.upper()}" for kind in (EngineConfig, ServerConfig) for name in settings_of(kind)}
PREMIUM, TRIAL, OTHER = "sk-0a1b", "sk-0a1c", "sk-0a1d"
CHAT = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}


def text_of(*command: object) -> str:
    """Return the output of a command that succeeds."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
    return done.stdout + done.stderr


def variables(text: str) -> set[str]:
    return set(re.findall(r"\bOCTAVO_[A-Z_]+", text))


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The systemd unit, with a command that exists on this machine."""
    text = (DEPLOY / "systemd" / "octavo.service").read_text()
    assert "/opt/octavo/bin/octavo" in text
    path = tmp_path / "octavo.service"
    path.write_text(text.replace("/opt/octavo/bin/octavo", sys.executable))
    return path


def test_systemd_accepts_the_unit(unit: Path) -> None:
    assert text_of(program("systemd-analyze"), "verify", unit) == ""


def test_the_unit_is_sandboxed(unit: Path) -> None:
    """A service without any sandboxing has an exposure of 9.6, one without access to anything of 0."""
    report = text_of(program("systemd-analyze"), "security", "--offline=true", "--threshold=20", "--no-pager", unit)
    [exposure] = re.findall(r"Overall exposure level for octavo.service: ([\d.]+)", report)
    assert float(exposure) < 2


def test_all_settings_in_deploy_exist() -> None:
    for path in (DEPLOY / "systemd" / "octavo.service", DEPLOY / "systemd" / "octavo.env", ROOT / "Dockerfile"):
        unknown = variables(path.read_text()) - SETTINGS
        assert not unknown, path
    octavo = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["octavo"]
    assert {name for name in octavo["environment"] if name.startswith("OCTAVO_")} <= SETTINGS
    documented = variables((ROOT / "docs" / "deploy.md").read_text()) - {"OCTAVO_ADDRESS", "OCTAVO_CONTAINER_MEMORY"}
    assert documented <= SETTINGS, "the two are of deploy/compose.yaml alone"


def test_the_drain_ends_before_the_process_is_killed(unit: Path) -> None:
    drain = ServerConfig().drain_timeout
    [stop] = re.findall(r"^TimeoutStopSec=(\d+)s$", unit.read_text(), re.MULTILINE)
    grace = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["octavo"]["stop_grace_period"]
    assert min(int(stop), int(grace.removesuffix("s"))) >= drain + 10


def test_compose() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    octavo = compose["services"]["octavo"]
    assert octavo["read_only"] and octavo["cap_drop"] == ["ALL"]
    assert (DEPLOY / octavo["build"] / "Dockerfile").exists()
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).is_dir() if source.startswith(".") else source in compose["volumes"]


ALL_OPTIONS = {
    "args": ["--kv-cache-memory", "1GiB"],
    "secrets": ["octavo-secrets"],
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "keySecret": {"name": "octavo-metrics", "key": "token"}},
    "models": {"existingClaim": "models"},
    "kvDisk": {"enabled": True, "storageClassName": "fast"},
    "imagePullSecrets": [{"name": "pull"}],
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
}


def rendered_objects(values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Render the chart as Helm does; returns its objects. The test is skipped without Helm's library."""
    helm = pytest.importorskip("helm_python")
    with helm.Chart.load(str(DEPLOY / "helm" / "octavo")) as chart:
        files = chart.render(values, name=name, namespace="prod").values()
    return [each for text in files for each in yaml.safe_load_all(text) if each]


def rendered(values: dict[str, Any], name: str = "demo") -> dict[str, Any]:
    """Return the objects of a chart that has one of each kind, by kind."""
    return {each["kind"]: each for each in rendered_objects(values, name)}


@pytest.mark.parametrize(
    ("values", "more"),
    [({}, {"PersistentVolumeClaim"}), (ALL_OPTIONS, {"HorizontalPodAutoscaler", "ServiceMonitor"})],
)
def test_kubernetes_accepts_the_chart(values: dict[str, Any], more: set[str]) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    objects = rendered(values)
    assert set(objects) == {"Deployment", "Service", "PodDisruptionBudget"} | more
    for kind, each in objects.items():
        if kind != "ServiceMonitor":  # it is defined by the Prometheus operator
            validate(each, "1.33", strict=True)
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for selector in (
        objects["Service"]["spec"]["selector"],
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels


def test_a_pod_of_the_chart_drains_and_is_sandboxed() -> None:
    pod = rendered({"preStopSeconds": 7, "drainSeconds": 30, "secrets": ["s"]})["Deployment"]["spec"]["template"][
        "spec"
    ]
    [container] = pod["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert "--drain-timeout=30" in container["args"] and pod["terminationGracePeriodSeconds"] > 37
    assert pod["enableServiceLinks"] is False  # OCTAVO_PORT=tcp://... would be a wrong setting
    assert container["securityContext"]["readOnlyRootFilesystem"] and pod["securityContext"]["runAsNonRoot"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/models", "/data", "/tmp"}
    assert container["envFrom"] == [{"secretRef": {"name": "s"}}]
    assert f"USER {pod['securityContext']['runAsUser']}\n" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("claim", ["", "kept"])
def test_kv_pages_are_kept_on_a_volume(claim: str) -> None:
    pod = rendered({"kvDisk": {"enabled": True, "existingClaim": claim}})["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    [volume] = [each for each in pod["volumes"] if each["name"] == "kv"]
    assert {"name": "kv", "mountPath": "/kv"} in container["volumeMounts"] and "--kv-disk=/kv" in container["args"]
    [size] = [each.partition("=")[2] for each in container["args"] if each.startswith("--kv-disk-size=")]
    assert EngineConfig(kv_disk="/kv", kv_disk_size=size).kv_disk_size < 20 * 2**30, "less than the volume"
    if claim:
        assert volume["persistentVolumeClaim"] == {"claimName": claim}
    else:
        template = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
        assert template["resources"]["requests"] == {"storage": "20Gi"}


ENGINES = {
    "engines": {
        "enabled": True,
        "args": ["--tensor-parallel-size=2"],
        "secrets": ["hub"],
        "keda": {"enabled": True},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
    },
    "redis": {"enabled": True},
    "kvDisk": {"enabled": True},
    "imagePullSecrets": [{"name": "pull"}],
}
KEDA = {  # fields of KEDA's ScaledObject, and of its trigger for Prometheus
    "spec": {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "triggers"},
    "trigger": {"type", "metadata"},
    "metadata": {"serverAddress", "query", "threshold", "ignoreNullValues"},
}


def rendered_all(values: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """Return the chart's objects by kind and by what follows the release's name, such as "-engines"."""
    return {
        (each["kind"], each["metadata"]["name"].removeprefix("demo-octavo")): each
        for each in rendered_objects(values, "demo")
    }


def pod_of(workload: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the specification of a workload's pods, and of their only container."""
    pod = workload["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container


def test_kubernetes_accepts_engines_in_pods_of_their_own() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    objects = rendered_all(ENGINES)
    assert set(objects) == {
        *((kind, "") for kind in ("Deployment", "Service", "PodDisruptionBudget")),
        *((kind, "-engines") for kind in ("StatefulSet", "Service", "PodDisruptionBudget", "Secret")),
        *((kind, "-engines") for kind in ("NetworkPolicy", "ScaledObject")),
        *((kind, "-redis") for kind in ("Deployment", "Service", "NetworkPolicy")),
        ("PersistentVolumeClaim", "-models"),
    }
    for (kind, _), each in objects.items():
        if kind != "ScaledObject":  # it is defined by KEDA
            validate(each, "1.33", strict=True)


@pytest.mark.parametrize("values", [ENGINES, {**ENGINES, "kvDisk": {}, "redis": {}}, {"redis": {"enabled": True}}])
def test_octavo_knows_the_flags_of_the_chart(values: dict[str, Any]) -> None:
    for workload in rendered_all(values).values():
        if workload["kind"] in ("Deployment", "StatefulSet") and "redis" not in workload["metadata"]["name"]:
            _, container = pod_of(workload)
            command = container.get("command", ["octavo", "serve"])[1]
            usage = text_of(Path(sys.executable).with_name("octavo"), command, "--help")
            known = set(re.findall(r"--[a-z-]+", usage))
            flags = {each.partition("=")[0] for each in container["args"] if each.startswith("--")}
            assert flags <= known, command


def test_servers_find_the_engines_and_their_secret() -> None:
    objects = rendered_all(ENGINES)
    _, server = pod_of(objects["Deployment", ""])
    engine_pod, engine = pod_of(objects["StatefulSet", "-engines"])
    service = objects["Service", "-engines"]
    [port] = service["spec"]["ports"]
    assert f"--engines=tcp://{service['metadata']['name']}:{port['port']}" in server["args"]
    assert service["spec"]["clusterIP"] == "None", "the name has the address of each engine"
    assert engine["args"][:2] == ["smollm2", f"--listen=tcp://0.0.0.0:{port['port']}"]
    assert "smollm2" not in server["args"] and not any(each.startswith("--kv-disk") for each in server["args"])
    for pod, container in (pod_of(objects["Deployment", ""]), (engine_pod, engine)):
        [volume] = [each["secret"] for each in pod["volumes"] if each["name"] == "secret"]
        assert volume["secretName"] == objects["Secret", "-engines"]["metadata"]["name"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
        assert "--secret-file=/secrets/secret" in container["args"]
    secret = base64.b64decode(objects["Secret", "-engines"]["data"]["secret"]).decode()
    assert re.fullmatch("[0-9a-f]{64}", secret)
    named = rendered_all({"engines": {"enabled": True, "existingSecret": "ours"}})
    assert ("Secret", "-engines") not in named
    pod, _ = pod_of(named["StatefulSet", "-engines"])
    assert "ours" in [each.get("secret", {}).get("secretName") for each in pod["volumes"]]


def test_selectors_keep_servers_engines_and_redis_apart() -> None:
    objects = rendered_all(ENGINES)
    workloads = [("Deployment", ""), ("StatefulSet", "-engines"), ("Deployment", "-redis")]
    labels = {name: objects[kind, name]["spec"]["template"]["metadata"]["labels"] for kind, name in workloads}

    def chosen(selector: dict[str, str]) -> list[str]:
        return [name for name, each in labels.items() if selector.items() <= each.items()]

    for (kind, name), each in objects.items():
        match kind:
            case "Service":
                assert chosen(each["spec"]["selector"]) == [name]
            case "Deployment" | "StatefulSet" | "PodDisruptionBudget":
                assert chosen(each["spec"]["selector"]["matchLabels"]) == [name]
            case "NetworkPolicy":
                assert chosen(each["spec"]["podSelector"]["matchLabels"]) == [name]
                rule, *others = each["spec"]["ingress"]
                sources = [chosen(source["podSelector"]["matchLabels"]) for source in rule["from"]]
                if name == "-engines":  # from each other, they fetch pages at ports that were free
                    [[engines]] = [other["from"] for other in others]
                    assert chosen(engines["podSelector"]["matchLabels"]) == ["-engines"]
                _, container = pod_of(next(objects[key] for key in workloads if key[1] == name))
                assert [each["port"] for each in rule["ports"]] == [container["ports"][0]["containerPort"]]
                assert sources == ([[""]] if name == "-engines" else [[""], ["-engines"]])


def test_engines_drain_spread_and_are_sandboxed() -> None:
    workload = rendered_all({**ENGINES, "preStopSeconds": 7})["StatefulSet", "-engines"]
    pod, container = pod_of(workload)
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert pod["terminationGracePeriodSeconds"] > 7 + DRAIN
    assert pod["enableServiceLinks"] is False and pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    [spread] = pod["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"] == workload["spec"]["selector"]
    assert "--tensor-parallel-size=2" in container["args"]
    assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]


@pytest.mark.parametrize("redis", [{"enabled": True}, {"url": "redis://cache:6379"}])
def test_engines_share_pages_and_servers_share_limits(redis: dict[str, Any]) -> None:
    objects = rendered_all({**ENGINES, "redis": redis})
    url = redis.get("url", "redis://demo-octavo-redis:6379")
    for key, flag in ((("Deployment", ""), "--rate-limit-store"), (("StatefulSet", "-engines"), "--kv-store")):
        _, container = pod_of(objects[key])
        assert [each for each in container["args"] if "redis:" in each] == [f"{flag}={url}"]
    assert (("Deployment", "-redis") in objects) == ("enabled" in redis)
    if "enabled" in redis:
        _, container = pod_of(objects["Deployment", "-redis"])
        settings = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
        assert settings["--maxmemory"] == "4gb" and settings["--maxmemory-policy"] == "allkeys-lru"


def test_keda_scales_engines_by_metrics_that_exist() -> None:
    objects = rendered_all(ENGINES)
    scaled = objects["ScaledObject", "-engines"]
    assert scaled["apiVersion"] == "keda.sh/v1alpha1" and set(scaled["spec"]) == KEDA["spec"]
    workload = objects["StatefulSet", "-engines"]
    target = {key: workload[key] for key in ("apiVersion", "kind")} | {"name": workload["metadata"]["name"]}
    assert scaled["spec"]["scaleTargetRef"] == target and "replicas" not in workload["spec"]
    [trigger] = scaled["spec"]["triggers"]
    assert set(trigger) == KEDA["trigger"] and set(trigger["metadata"]) == KEDA["metadata"]
    assert all(isinstance(each, str) for each in trigger["metadata"].values())
    names = set(re.findall(r"vllm:\w+", trigger["metadata"]["query"]))
    documented = set(re.findall(r"^\| `(vllm:\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    assert len(names) == 2 and names <= documented
    assert 'namespace="prod",service="demo-octavo"' in trigger["metadata"]["query"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"engines": {"enabled": True, "keda": {"enabled": True, "minReplicas": 0}}}, "minReplicas must be 1"),
        ({"redis": {"enabled": True, "url": "redis://cache:6379"}}, "not both"),
    ],
)
def test_the_chart_refuses_what_does_not_work(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        rendered_all(values)


def gateway_objects() -> dict[str, Any]:
    text = (DEPLOY / "gateway" / "inference-pool.yaml").read_text()
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def test_kubernetes_accepts_the_gateway_example() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for kind, each in gateway_objects().items():
        if kind not in ("InferencePool", "HTTPRoute"):  # they are defined by the Gateway API, see the next test
            validate(each, "1.33", strict=True)


def test_the_gateway_leads_to_the_pods_of_the_chart() -> None:
    """The fields of InferencePool and HTTPRoute are those of the Gateway API's version 1."""
    objects = gateway_objects()
    pool, route = objects["InferencePool"], objects["HTTPRoute"]
    pod = rendered({}, name="octavo")["Deployment"]["spec"]["template"]
    [port] = pod["spec"]["containers"][0]["ports"]
    picker = objects["Deployment"]["spec"]["template"]
    [service_port] = objects["Service"]["spec"]["ports"]
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1" and set(pool) == {*POOL, "spec"}
    assert set(pool["spec"]) == {"selector", "targetPorts", "endpointPickerRef"}
    assert pool["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert pool["spec"]["targetPorts"] == [{"number": port["containerPort"]}]
    assert pool["spec"]["endpointPickerRef"] == {
        "kind": "Service",
        "name": objects["Service"]["metadata"]["name"],
        "port": {"number": service_port["port"]},
        "failureMode": "FailOpen",
    }
    assert objects["Service"]["spec"]["selector"].items() <= picker["metadata"]["labels"].items()
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1" and set(route) == {*POOL, "spec"}
    [rule] = route["spec"]["rules"]
    assert set(route["spec"]) == {"parentRefs", "rules"} and set(rule) == {*RULE}
    [removed] = rule["filters"]  # a client does not name its tenant
    assert removed["requestHeaderModifier"] == {"remove": ["X-Octavo-Tenant"]}
    group = pool["apiVersion"].partition("/")[0]
    assert rule["backendRefs"] == [{"group": group, "kind": pool["kind"], "name": pool["metadata"]["name"]}]
    picker_rules = objects["Role"]["rules"]
    assert {(group, "inferencepools"), ("", "pods")} <= {
        (each, kind) for rule in picker_rules for each in rule["apiGroups"] for kind in rule["resources"]
    }


POOL = ("apiVersion", "kind", "metadata")
RULE = ("matches", "filters", "backendRefs", "timeouts")


def test_the_endpoint_picker_reads_metrics_that_exist(server: ServerProcess) -> None:
    [container] = gateway_objects()["Deployment"]["spec"]["template"]["spec"]["containers"]
    args = dict(each.removeprefix("--").split("=", 1) for each in container["args"])
    wanted = [args["total-queued-requests-metric"], args["kv-cache-usage-percentage-metric"]]
    metrics = httpx.get(f"{server.url}/metrics").text
    for name in wanted:
        [value] = re.findall(rf"^{name}{{[^}}]*}} ([\d.e+-]+)$", metrics, re.MULTILINE)
        assert float(value) == 0, "the server is idle"
    config = yaml.safe_load(gateway_objects()["ConfigMap"]["data"][Path(args["config-file"]).name])
    used = {each["pluginRef"] for each in config["schedulingProfiles"][0]["plugins"]}
    assert used == {each["type"] for each in config["plugins"]}


def test_hadolint_accepts_the_dockerfile() -> None:
    """DL3008 and DL3013 want fixed versions of the compiler, and of what the wheel names."""
    ignored = [flag for rule in ("DL3008", "DL3013") for flag in ("--ignore", rule)]
    assert text_of(program("hadolint"), *ignored, ROOT / "Dockerfile") == ""


@pytest.fixture(scope="module")
def server(tiny_model: Callable[[str], Path]) -> Iterator[ServerProcess]:
    with ServerProcess(tiny_model("llama"), "--enable-metrics") as server:
        yield server


@contextlib.contextmanager
def nginx(folder: Path, upstream: str) -> Generator[str]:
    """Run nginx with deploy/nginx for a `with` block; yields its address."""
    port = free_port()
    conf = (DEPLOY / "nginx" / "octavo.conf").read_text()
    conf = conf.replace("listen 8080", f"listen 127.0.0.1:{port}").replace("127.0.0.1:8000", upstream)
    (folder / "octavo.conf").write_text(conf)
    keys = f"{PREMIUM} premium:alice;\n{TRIAL} trial:bob;\n{OTHER} premium:carol;\n"
    (folder / "octavo-keys.map").write_text((DEPLOY / "nginx" / "octavo-keys.map").read_text() + keys)
    paths = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {paths} include {folder}/octavo.conf; }}\n"
    )
    command = [program("nginx"), "-p", str(folder), "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"]
    with running(command, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def proxy(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    host, port = server.address
    with nginx(tmp_path_factory.mktemp("nginx"), f"{host}:{port}") as url:
        yield url


def bearer(key: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **more}


@pytest.mark.parametrize(
    "headers",
    [{}, bearer("sk-wrong"), {"Authorization": "Bearer"}, {"x-api-key": "premium:alice"}, {"Authorization": PREMIUM}],
)
def test_no_key_no_answer(proxy: str, headers: dict[str, str]) -> None:
    reply = httpx.get(f"{proxy}/v1/models", headers=headers)
    assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    assert httpx.post(f"{proxy}/v1/files", headers=headers).status_code == 401


def test_keys_are_taken_from_both_headers(proxy: str) -> None:
    for headers in (bearer(PREMIUM), {"x-api-key": PREMIUM}, {"authorization": f"bearer {PREMIUM}"}):
        assert httpx.get(f"{proxy}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{proxy}/health").status_code == httpx.get(f"{proxy}/ready").status_code == 200
    for path in ("/v1/admin/models", "/stats", "/stats/live", "/metrics"):
        assert httpx.get(f"{proxy}{path}", headers=bearer(PREMIUM)).status_code == 404


def test_tokens_are_passed_on_as_they_come(proxy: str) -> None:
    url, headers = f"{proxy}/v1/completions", bearer(PREMIUM)
    with httpx.stream("POST", url, json=CHAT | {"model": "tiny"}, headers=headers, timeout=60) as reply:
        pieces = [piece for piece in reply.iter_raw() if piece]
    assert b"".join(pieces).rstrip().endswith(b"[DONE]")
    assert len(pieces) > 50  # nginx's buffer would hold many tokens


def test_the_proxy_decides_on_the_tenant(proxy: str) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 2, "kv_cache_state": True}
    pretender = bearer(PREMIUM, **{"X-Octavo-Tenant": "carol"})
    reply = httpx.post(f"{proxy}/v1/completions", json=body, headers=pretender, timeout=60).json()
    state = f"{proxy}/v1/kv_cache_states/{reply['kv_cache_state']['id']}"
    thief = bearer(OTHER, **{"X-Octavo-Tenant": "alice"})
    assert httpx.get(state, headers=thief).status_code == 404
    assert httpx.get(state, headers=bearer(PREMIUM)).status_code == 200


def test_limits_of_a_plan_concern_that_key_only(proxy: str) -> None:
    replies = [httpx.get(f"{proxy}/v1/models", headers=bearer(TRIAL)) for _ in range(12)]
    refused = [reply for reply in replies if reply.status_code == 429]
    assert [reply.status_code for reply in replies[:6]] == [200] * 6  # one, and the burst of five
    assert len(refused) >= 5  # 30 a minute: at most one more in two seconds
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded" and int(refused[0].headers["Retry-After"]) > 0
    assert httpx.get(f"{proxy}/v1/models", headers=bearer(PREMIUM)).status_code == 200


def test_without_octavo_the_proxy_says_so(tmp_path: Path) -> None:
    with nginx(tmp_path, f"127.0.0.1:{free_port()}") as url:
        reply = httpx.get(f"{url}/v1/models", headers=bearer(PREMIUM))
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "unavailable"
