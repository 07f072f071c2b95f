"""Events in Chrome's trace event format, one JSON object per line. Times are in microseconds of time.monotonic()."""

from typing import Any

import msgspec

REQUEST = "request"  # the category of the events of a request's life


def microseconds(seconds: float) -> int:
    """Return a time as the integer of a trace event."""
    return int(seconds * 1e6)


def line(event: dict[str, Any]) -> bytes:
    """Return an event as a line of a trace file, which follows other lines."""
    return b"," + msgspec.json.encode(event) + b"\n"


def request_event(phase: str, name: str, id: str, seconds: float, pid: int, args: dict[str, Any]) -> bytes:
    """Return an event in the life of a request.

    Args:
        phase: "b" for its begin, "e" for its end, "n" for what happens in between.
        id: the id of the request; its begin and its end have the same name.
        seconds: time.monotonic() of the event.
        pid: the id of the process that reports the event.
    """
    event = {"name": name, "cat": REQUEST, "ph": phase, "id2": {"global": id}, "pid": pid, "tid": pid}
    return line(event | {"ts": microseconds(seconds), "args": args})


def instant(name: str, seconds: float, pid: int, args: dict[str, Any]) -> bytes:
    """Return an event of a process that has no duration."""
    event = {"name": name, "ph": "i", "s": "p", "pid": pid, "tid": pid, "ts": microseconds(seconds), "args": args}
    return line(event)


def name_process(pid: int, name: str) -> bytes:
    """Return the event that names a process."""
    return line({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}})


def name_engine(pid: int, model: str, number: int) -> bytes:
    """Return the event that says which engine runs in a process. Perfetto ignores it."""
    args = {"model": model, "engine": number, "engine_pid": pid}
    return line({"name": "octavo_engine", "ph": "M", "pid": pid, "args": args})


def name_thread(pid: int, tid: int, name: str) -> bytes:
    """Return the event that names a thread."""
    return line({"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}})
