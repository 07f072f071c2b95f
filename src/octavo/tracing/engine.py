"""EngineTrace: the events of one engine, as lines of a trace file. The engine's link sends them to the frontend."""

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident, get_native_id
from typing import Any

from .events import instant, line, microseconds, name_thread, request_event

MAX_LINES = 20_000  # lines that are kept until `take`; more are dropped and counted
HOST, SWAP, PREFILL, DECODE, SAMPLING, IDLE = "host", "swap", "prefill", "decode", "sampling", "idle"
"""The categories of an engine's slices: the parts of its time."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When the stages of a step began, and when the last one ended, in seconds of time.monotonic()."""

    collecting: float  # finished transfers
    scheduling: float
    computing: float
    emitting: float
    ended: float


class EngineTrace:
    """The events of an engine. `slice` may be called by any thread, the other methods by the engine's.

    Args:
        sampling_seconds: returns the seconds that the backend has spent on sampling so far; None if it does not
            measure them. Then they count as those of prefill and decode.
    """

    def __init__(self, sampling_seconds: Callable[[], float] | None = None):
        self._pid = os.getpid()
        self._lines: deque[bytes] = deque()  # other threads may append at any time
        self._dropped = 0
        self._threads: dict[int, int] = {}  # the ids in the trace of the threads whose names have been written
        self._sampling_seconds = sampling_seconds
        self._sampled = 0.0  # the latest value of sampling_seconds

    def take(self) -> bytes:
        """Return the lines of the events since the last call."""
        if not self._lines:
            return b""
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if self._dropped:
            lines.append(instant("events dropped", time.monotonic(), self._pid, {"events": self._dropped}))
            self._dropped = 0
        return b"".join(lines)

    def step(self, times: StepTimes, prefill: int, decode: int, drafts: int) -> None:
        """Write a step and its parts. Backends compute all rows together: their time is divided by numbers of rows.

        Args:
            prefill, decode, drafts: rows of prompts, of sequences with one token to compute, and of draft tokens.
        """
        start = microseconds(times.collecting)
        scheduling, computing = microseconds(times.scheduling), microseconds(times.computing)
        emitting, ended = microseconds(times.emitting), microseconds(times.ended)
        sampling = emitting - microseconds(min(self._last_sampling(), times.emitting - times.computing))
        decoding = computing + (sampling - computing) * prefill // max(prefill + decode + drafts, 1)
        thread = f'"pid":{self._pid},"tid":{self._thread("engine")}'
        args = f'"prefill_tokens":{prefill},"decode_tokens":{decode},"draft_tokens":{drafts}'
        lines = [f',{{"name":"step","ph":"X",{thread},"ts":{start},"dur":{ended - start},"args":{{{args}}}}}\n']
        for name, part, begin, end in (
            ("collect transfers", SWAP, start, scheduling),
            ("schedule", HOST, scheduling, computing),
            ("prefill", PREFILL, computing, decoding),
            ("decode", DECODE, decoding, sampling),
            ("sampling", SAMPLING, sampling, emitting),
            ("emit", HOST, emitting, ended),
        ):
            if end > begin:
                lines.append(
                    f',{{"name":"{name}","cat":"{part}","ph":"X",{thread},"ts":{begin},"dur":{end - begin}}}\n'
                )
        self._add("".join(lines).encode())  # formatted by hand: a third of the time of a JSON encoder

    def slice(self, name: str, part: str, began: float, thread: str = "engine") -> None:
        """Write what the calling thread has done since `began`.

        Args:
            part: the category, such as SWAP.
            thread: what the thread is.
        """
        tid, start = self._thread(thread), microseconds(began)
        duration = microseconds(time.monotonic()) - start
        event = {"name": name, "cat": part, "ph": "X", "pid": self._pid, "tid": tid, "ts": start, "dur": duration}
        self._add(line(event))

    def request(self, id: str, name: str, sequence: str, **args: Any) -> None:
        """Write what happens to a request.

        Args:
            id: the request's id in the trace; if it is "", nothing is written.
            sequence: the engine's id of the completion.
        """
        if id:
            event = request_event("n", name, id, time.monotonic(), self._pid, {"sequence": sequence, **args})
            self._add(event)

    def copying(self, copy_page: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Return `copy_page` with an event for each copy."""

        def copy(source: int, target: int) -> None:
            began = time.monotonic()
            copy_page(source, target)
            self.slice("copy page", SWAP, began)

        return copy

    def _last_sampling(self) -> float:
        """Return the seconds that the last step has spent on sampling."""
        if self._sampling_seconds is None:
            return 0.0
        before, self._sampled = self._sampled, self._sampling_seconds()
        return self._sampled - before

    def _thread(self, kind: str) -> int:
        """Return the id of the calling thread, and write its name at the first call."""
        tid = self._threads.get(get_ident())
        if tid is None:
            tid = self._threads[get_ident()] = get_native_id()
            self._add(name_thread(self._pid, tid, kind))
        return tid

    def _add(self, lines: bytes) -> None:
        if len(self._lines) < MAX_LINES:
            self._lines.append(lines)
        else:
            self._dropped += lines.count(b"\n")
