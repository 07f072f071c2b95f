"""EngineTrace: the events of one engine, as records. The engine's link sends them to the frontend."""

import os
import time
from collections import deque
from collections.abc import Callable
from threading import get_ident, get_native_id

from .records import SWAP, Dropped, Record, Slice, Step, ThreadName, encode_records

MAX_RECORDS = 20_000  # that are kept until `take`; more are dropped and counted


class EngineTrace:
    """The events of an engine. `slice` may be called by any thread, the other methods by the engine's.

    Args:
        sampling_seconds: returns the seconds that the backend has spent on sampling so far; None if it does not
            measure them. Then they count as those of prefill and decode.
    """

    def __init__(self, sampling_seconds: Callable[[], float] | None = None):
        self._pid = os.getpid()
        self._records: deque[Record] = deque()  # other threads may append at any time
        self._dropped = 0
        self._threads: dict[int, int] = {}  # the ids in the trace of the threads whose names have been written
        self._sampling_seconds = sampling_seconds
        self._sampled = 0.0  # the latest value of sampling_seconds

    def take(self) -> bytes:
        """Return the events since the last call, for `TraceFile.write_records`; b"" if there are none."""
        if not self._records:
            return b""
        records = [self._records.popleft() for _ in range(len(self._records))]
        if self._dropped:
            records.append(Dropped(self._dropped))
            self._dropped = 0
        return encode_records(self._pid, records)

    def step(
        self,
        collecting: float,
        scheduling: float,
        computing: float,
        emitting: float,
        ended: float,
        rows: tuple[int, int, int],
    ) -> None:
        """Record when the stages of a step began, and when the last one ended.

        Args:
            collecting, scheduling, computing, emitting, ended: in seconds of time.monotonic().
            rows: those of prompts, of sequences with one token to compute, and of draft tokens.
        """
        thread = self._thread("engine")
        self._add(Step(thread, collecting, scheduling, computing, emitting, ended, self._last_sampling(), *rows))

    def slice(self, name: str, part: str, began: float, thread: str = "engine") -> None:
        """Record what the calling thread has done since `began`.

        Args:
            part: the category, such as SWAP.
            thread: what the thread is.
        """
        self._add(Slice(self._thread(thread), name, part, began, time.monotonic()))

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
        """Return the id of the calling thread, and record its name at the first call."""
        tid = self._threads.get(get_ident())
        if tid is None:
            tid = self._threads[get_ident()] = get_native_id()
            self._add(ThreadName(tid, kind))
        return tid

    def _add(self, record: Record) -> None:
        if len(self._records) < MAX_RECORDS:
            self._records.append(record)
        else:
            self._dropped += 1
