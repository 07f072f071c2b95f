"""Traces: where the time of engines and requests goes, as a file that Perfetto opens (docs/tracing.md).

`engine.py` collects an engine's times as `records.py`, `request_events.py` what it does with requests; `file.py` writes
trace files, `reading.py` and `report.py` evaluate them. `spans.py` sends spans to an OpenTelemetry collector.
"""
