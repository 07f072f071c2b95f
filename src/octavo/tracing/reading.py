"""Read a trace file: the time of each engine by part, and the life of each request. Memory is bounded."""

import heapq
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from octavo.errors import ConfigError

from .events import REQUEST

MAX_LINE = 2**20  # bytes of a line that may be an event


class Event(msgspec.Struct, gc=False):
    """A line of a trace file; see docs/tracing.md. Times are in microseconds."""

    name: str
    ph: str = ""
    pid: int = 0
    tid: int = 0
    ts: int = -1
    dur: int = 0
    cat: str = ""
    id2: dict[str, str] = {}
    args: dict[str, Any] = {}


_DECODER = msgspec.json.Decoder(Event)
_ENDS = b"], \r\n"  # what may follow an event in its line


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
        counts: its events by name.
        parts: how long it was queued, and so on; see `_add_parts`.
    """

    id: str
    model: str
    begin: int
    prompt_tokens: int
    counts: Counter[str] = field(default_factory=Counter)
    first_token: int | None = None
    end: int | None = None
    reason: str = ""
    output_tokens: int = 0
    parts: Counter[str] = field(default_factory=Counter)


@dataclass
class Trace:
    """The content of a trace file.

    Attributes:
        requests: the slowest ones, the slowest first.
        num_requests, num_unfinished: of all requests.
        dropped: events that were dropped because they could not be written in time.
        damaged: lines that are no events, such as the last line of a server that was killed.
    """

    engines: list[EngineTime]
    requests: list[RequestLife]
    num_requests: int
    num_unfinished: int
    dropped: int = 0
    damaged: int = 0


def read_trace(path: Path, slowest: int) -> Trace:
    """Read a trace file. Damaged lines are counted and left out. Raises ConfigError if it is no trace file.

    Args:
        slowest: number of the slowest requests to keep.
    """
    try:
        file = path.open("rb")
        first = file.readline(MAX_LINE)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    with file:
        if not _begins_a_trace(first):
            raise ConfigError(f"{path} is no trace file of Octavo; octavo serve --trace FILE writes one")
        return _read(path, file, slowest)


def _begins_a_trace(line: bytes) -> bool:
    try:
        return _DECODER.decode(line.lstrip(b"[").rstrip(_ENDS)).name == "octavo"
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False


def _read(path: Path, file: BinaryIO, slowest: int) -> Trace:
    """Read what follows the first line of a trace file."""
    reader = _Reader(slowest)
    try:
        while text := file.readline(MAX_LINE):
            reader.read(text)
        return reader.end()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError, msgspec.ValidationError):
        raise ConfigError(f"{path} has events that this version of Octavo does not write") from None


class _Reader:
    """Takes the events of a file in its order, in which a request ends after all that happens to it."""

    def __init__(self, slowest: int):
        self._engines: dict[int, EngineTime] = {}  # by process
        self._names: dict[int, Event] = {}  # the events that name the engines, by process
        self._threads: dict[tuple[int, int], str] = {}  # what threads are, by process and id
        self._live: dict[str, tuple[RequestLife, list[Event]]] = {}
        self._slowest: list[tuple[int, int, RequestLife]] = []  # a heap
        self._limit = slowest
        self._lost: dict[int, int] = {}  # when an engine was lost, by its process
        self._num_requests = self._latest = self._dropped = self._damaged = 0

    def read(self, line: bytes) -> None:
        """Evaluate a line. Raises msgspec.ValidationError, or what `_add` raises."""
        try:
            event = _DECODER.decode(line.lstrip(b",").rstrip(_ENDS))
        except msgspec.ValidationError:
            raise
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._damaged += 1
        else:
            self._add(event)

    def _add(self, event: Event) -> None:
        self._latest = max(self._latest, event.ts)
        match event.ph:
            case "X":
                engine = self._engines.get(event.pid) or self._engines.setdefault(event.pid, EngineTime(pid=event.pid))
                _add_slice(engine, event, self._threads.get((event.pid, event.tid), "engine"))
            case "b" | "e" | "n" if event.cat == REQUEST:
                self._add_to_request(event)
            case "M" if event.name == "octavo_engine":
                self._names[event.pid] = event
            case "M" if event.name == "thread_name":
                self._threads[event.pid, event.tid] = event.args["name"]
            case "i" if event.name == "events dropped":
                self._dropped += event.args["events"]
            case "i" if event.name == "engine ended":
                pid = event.args["engine_pid"]
                self._lost[pid] = event.ts
                self._engines.setdefault(pid, EngineTime(pid=pid)).exit = event.args["reason"]

    def end(self) -> Trace:
        """Return what was read. The last event is the end of requests that have not ended."""
        unfinished = list(self._live.values())
        for life, events in unfinished:
            self._keep(life, events)
        engines = []
        for pid, event in self._names.items():
            engine = self._engines.get(pid) or EngineTime(pid=pid)
            engine.model, engine.number = event.args["model"], event.args["engine"]
            engine.parts["between steps"] = engine.end - engine.begin - engine.parts.total()
            engines.append(engine)
        engines.sort(key=lambda engine: (engine.model, engine.number, engine.begin))
        requests = [life for _, _, life in sorted(self._slowest, key=lambda entry: (-entry[0], entry[1]))]
        return Trace(engines, requests, self._num_requests, len(unfinished), self._dropped, self._damaged)

    def _add_to_request(self, event: Event) -> None:
        id, args = event.id2["global"], event.args
        if event.ph == "b":
            if id in self._live:  # its end was dropped, and a later request has the same id
                self._keep(*self._live.pop(id))
            life = RequestLife(args["reply"] or id, args["model"], event.ts, args["prompt_tokens"])
            self._live[id] = (life, [])
        elif id in self._live:
            life, events = self._live[id]
            events.append(event)
            life.counts[event.name] += 1
            if event.name == "first token":
                life.first_token = event.ts
            elif event.ph == "e":
                life.end, life.reason, life.output_tokens = event.ts, args["reason"], args["output_tokens"]
                del self._live[id]
                self._keep(life, events)

    def _keep(self, life: RequestLife, events: list[Event]) -> None:
        """Evaluate a request, and keep it if it is one of the slowest."""
        self._num_requests += 1
        _add_parts(life, sorted(events, key=lambda event: event.ts), self._lost, self._latest)
        entry = (life.parts.total(), -self._num_requests, life)
        if len(self._slowest) < self._limit:
            heapq.heappush(self._slowest, entry)
        elif self._limit:
            heapq.heappushpop(self._slowest, entry)


def _add_slice(engine: EngineTime, event: Event, thread: str) -> None:
    if thread != "engine":
        engine.transfers[event.name] += event.dur
        return
    engine.begin = min(engine.begin or event.ts, event.ts)
    engine.end = max(engine.end, event.ts + event.dur)
    if event.name == "step":
        engine.steps += 1
        engine.prefill_tokens += event.args["prefill_tokens"]
        engine.decode_tokens += event.args["decode_tokens"]
        engine.draft_tokens += event.args["draft_tokens"]
    else:
        engine.parts[event.cat] += event.dur
        if event.name == "copy page":  # it happens while a step is scheduled
            engine.parts["host"] -= event.dur


def _add_parts(life: RequestLife, events: list[Event], lost: dict[int, int], end: int) -> None:
    """Divide the life of a request into parts, and add them to `parts`.

    "no engine" is the time until it is sent to an engine, "queued" from there until it is first admitted, "prefill"
    from there to the first token, "decode" the rest. "preempted", "engine lost" and "moved" last from such an event to
    the next admission. Several completions of one request count as one: what happens to any, happens to the request.
    """
    part, since, engine = "no engine", life.begin, 0
    for event in events:
        now, before = event.ts, part
        match event.name:
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
        engine = event.args.get("engine_pid", engine)
        life.parts[before] += now - since
        since = now
    life.parts[part] += (life.end or end) - since
