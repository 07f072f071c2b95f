"""Read a trace file: the time of each engine by part, and the life of each request."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from octavo.errors import ConfigError

from .events import REQUEST

Event = dict[str, Any]


@dataclass
class EngineTime:
    """What one engine process did, from its start to its last event. Times are in microseconds.

    Attributes:
        parts: the time of the engine's thread by part; "between steps" is the rest.
        transfers: the time of the threads that move KV pages, which run beside the engine's.
        exit: how it ended, if it ended unexpectedly.
    """

    model: str = ""
    number: int = 0
    pid: int = 0
    begin: int = 0
    end: int = 0
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    draft_tokens: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    transfers: Counter[str] = field(default_factory=Counter)
    exit: str | None = None


@dataclass
class RequestLife:
    """A request, from its arrival to its end. Times are in microseconds; `end` is None if it had not ended.

    Attributes:
        id: the id of the reply that a server's client got, or else the request's.
        parts: how long it was queued, and so on; see `_add_parts`.
    """

    id: str
    model: str
    begin: int
    prompt_tokens: int
    events: list[Event] = field(default_factory=list)
    first_token: int | None = None
    end: int | None = None
    reason: str = ""
    output_tokens: int = 0
    parts: Counter[str] = field(default_factory=Counter)

    def count(self, name: str) -> int:
        """Return the number of events of this name."""
        return sum(event["name"] == name for event in self.events)


@dataclass
class Trace:
    """The content of a trace file.

    Attributes:
        dropped: events that were dropped because they could not be written in time.
        damaged: lines that are no events, such as the last line of a server that was killed.
    """

    engines: list[EngineTime]
    requests: list[RequestLife]
    dropped: int = 0
    damaged: int = 0


def read_trace(path: Path) -> Trace:
    """Read a trace file. Damaged lines are counted and left out. Raises ConfigError if it is no trace file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    events, damaged = [], 0
    for text in lines:
        try:
            events.append(msgspec.json.decode(text.lstrip(b"[,").rstrip(b"], "), type=Event))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            damaged += 1
    if not events or events[0].get("name") != "octavo":
        raise ConfigError(f"{path} is no trace file of Octavo; octavo serve --trace FILE writes one")
    try:
        return _evaluated(events, damaged)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError(f"{path} has events that this version of Octavo does not write") from None


def _evaluated(events: list[Event], damaged: int) -> Trace:
    timed = sorted((event for event in events if "ts" in event), key=lambda event: event["ts"])
    dropped = sum(event["args"]["events"] for event in timed if event["name"] == "events dropped")
    engines = _engines(events, timed)
    return Trace(engines, _requests(timed), dropped, damaged)


def _engines(events: list[Event], timed: list[Event]) -> list[EngineTime]:
    engines: dict[int, EngineTime] = {}
    for event in events:
        if event["name"] == "octavo_engine":
            args, pid = event["args"], event["pid"]
            engines[pid] = EngineTime(args["model"], args["engine"], pid)
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    for event in timed:
        if event["name"] == "engine ended" and (lost := engines.get(event["args"]["engine_pid"])):
            lost.exit = event["args"]["reason"]
        if event["ph"] == "X" and (engine := engines.get(event["pid"])):
            _add_slice(engine, event, threads.get(event["tid"], "engine"))
    for engine in engines.values():
        engine.parts["between steps"] = engine.end - engine.begin - engine.parts.total()
    return sorted(engines.values(), key=lambda engine: (engine.model, engine.number, engine.begin))


def _add_slice(engine: EngineTime, event: Event, thread: str) -> None:
    if thread != "engine":
        engine.transfers[event["name"]] += event["dur"]
        return
    engine.begin = engine.begin or event["ts"]
    engine.end = max(engine.end, event["ts"] + event["dur"])
    if event["name"] == "step":
        engine.steps += 1
        engine.prefill_tokens += event["args"]["prefill_tokens"]
        engine.decode_tokens += event["args"]["decode_tokens"]
        engine.draft_tokens += event["args"]["draft_tokens"]
    else:
        engine.parts[event["cat"]] += event["dur"]
        if event["name"] == "copy page":  # it happens while a step is scheduled
            engine.parts["host"] -= event["dur"]


def _requests(timed: list[Event]) -> list[RequestLife]:
    requests: list[RequestLife] = []
    current: dict[str, RequestLife] = {}  # by id, of which a later request may have the same
    lost: dict[int, int] = {}  # when an engine was lost, by its process
    for event in timed:
        if event["name"] == "engine ended":
            lost[event["args"]["engine_pid"]] = event["ts"]
        if event.get("cat") != REQUEST:
            continue
        id, args = event["id2"]["global"], event["args"]
        if event["ph"] == "b":
            current[id] = RequestLife(args["reply"] or id, args["model"], event["ts"], args["prompt_tokens"])
            requests.append(current[id])
        elif life := current.get(id):
            life.events.append(event)
            if event["name"] == "first token":
                life.first_token = event["ts"]
            elif event["ph"] == "e":
                life.end, life.reason, life.output_tokens = event["ts"], args["reason"], args["output_tokens"]
    end = timed[-1]["ts"] if timed else 0
    for life in requests:
        _add_parts(life, lost, end)
    return requests


def _add_parts(life: RequestLife, lost: dict[int, int], end: int) -> None:
    """Divide the life of a request into parts, and add them to `parts`.

    "no engine" is the time until it is sent to an engine, "queued" from there until it is first admitted, "prefill"
    from there to the first token, "decode" the rest. "preempted", "engine lost" and "moved" last from such an event to
    the next admission. Several completions of one request count as one: what happens to any, happens to the request.
    """
    part, since, engine = "no engine", life.begin, 0
    for event in life.events:
        now, before = event["ts"], part
        match event["name"]:
            case "sent":
                part = "queued"
            case "moved" if since <= lost.get(engine, -1) <= now:
                part, now = "engine lost", lost[engine]
            case "moved":
                part = "moved"
            case "admitted" if part not in ("prefill", "decode"):
                part = "decode" if life.first_token is not None and now >= life.first_token else "prefill"
            case "first token":
                part = "decode"
            case "preempted":
                part = "preempted"
        engine = event["args"].get("engine_pid", engine)
        life.parts[before] += now - since
        since = now
    life.parts[part] += (life.end or end) - since
