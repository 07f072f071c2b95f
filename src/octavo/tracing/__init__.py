"""Traces: where the time of engines and requests goes, as a file that Perfetto opens (docs/tracing.md).

`file.py` writes trace files, `engine.py` makes an engine's events, `reading.py` and `summary.py` evaluate a file.
"""
