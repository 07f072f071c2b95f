"""Transfers: move pages between the pool and the tiers below it in threads, so that steps never wait for I/O."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Condition, Lock, Thread
from typing import Any, Literal, TypeVar

import numpy as np

from octavo.backends.base import Backend
from octavo.tracing.engine import EngineTrace
from octavo.tracing.records import SWAP

from .tiers.counts import TierCounts
from .tiers.tier import Tier

T = TypeVar("T")
_Job = tuple[Callable[[], Any], "Future[Any]"]

_INITIAL_SPEED = 1e9  # bytes per second; decides seconds_per_page until something has been fetched
_SMOOTHING = 0.1  # weight of the latest fetch in seconds_per_page

_log = logging.getLogger("octavo")


@dataclass(frozen=True, slots=True)
class Finished:
    """A transfer that has ended. `ok` is whether it succeeded. The transfer no longer needs its page."""

    kind: Literal["save", "fetch"]
    page: int
    key: bytes
    ok: bool


class Transfers:
    """Queues of saves and fetches, executed by threads. The engine's thread adds transfers and collects results.

    A page must stay referenced from the call that begins its transfer until `finished` returns the transfer. Pages are
    saved to every tier, and fetched from the first tier that has them. Fetches go before saves, since sequences wait
    for them.

    Args:
        backend: exports and imports the content of pages.
        tiers: the tiers below the pool, the fastest first.
        threads: number of threads; they start with the first job.
        max_saves: maximum number of pending saves.
        trace: takes an event for each transfer.
    """

    def __init__(
        self,
        backend: Backend,
        tiers: Sequence[Tier],
        *,
        threads: int = 2,
        max_saves: int = 64,
        trace: EngineTrace | None = None,
    ):
        self.pages_saved = self.pages_fetched = self.failures = self.pending_saves = 0
        self.seconds_per_page = backend.page_bytes / _INITIAL_SPEED  # averaged over successive fetches
        self._backend, self._stores, self.max_saves = backend, tuple(tiers), max_saves
        self._tiers: tuple[Tier, ...] = self._stores  # the stores and the files of loaded KV states
        lock = Lock()
        self._job_queued, self._job_done = Condition(lock), Condition(lock)
        self._fetches: deque[_Job] = deque()
        self._others: deque[_Job] = deque()
        self.counts = {tier.name: TierCounts() for tier in tiers}
        self._finished: list[Finished] = []
        self._is_woken = False
        self._fetching, self._last_fetch = 0, 0.0
        self._closed = False
        self._trace = trace
        self._num_threads = threads
        self._threads: list[Thread] = []

    @property
    def has_stores(self) -> bool:
        """Return whether there is a tier to save to."""
        return bool(self._stores)

    @property
    def has_tiers(self) -> bool:
        """Return whether there is currently a tier to fetch from."""
        return bool(self._tiers)

    @property
    def pages_refused(self) -> int:
        """Return the number of pages that a store did not accept since someone has changed them."""
        return sum(tier.refused for tier in self._stores)

    def tier_of(self, key: bytes) -> Tier | None:
        """Return the first tier that has this page. O(1) per tier, without I/O."""
        return next((tier for tier in self._tiers if key in tier), None)

    def save(self, page: int, key: bytes) -> bool:
        """Begin to write a page to all tiers. Return False if they have it, or if too many saves are pending."""
        if self._closed or self.pending_saves >= self.max_saves or all(key in tier for tier in self._stores):
            return False
        self._submit(self._others, partial(self._save, page, key), saves=1)
        return True

    def fetch(self, page: int, key: bytes) -> bool:
        """Begin to fill a page with the content of `key`. Return False if no tier has it."""
        if self._closed or self.tier_of(key) is None:
            return False
        self._submit(self._fetches, partial(self._fetch, page, key))
        return True

    def touch(self, keys: Sequence[bytes]) -> None:
        """Mark successive pages of a sequence as recently used in the tiers; the first will be evicted last.

        Otherwise the tiers would evict pages that are always found in the pool, and they would be lost in a restart.
        """
        if keys and len(self._others) < self.max_saves:
            self._submit(self._others, partial(self._touch, keys))

    def run(self, job: Callable[[], T]) -> "Future[T]":
        """Run another long job, such as writing a KV state, in the queue of the saves."""
        return self._submit(self._others, job)

    def finished(self) -> list[Finished]:
        """Return the transfers that have ended since the last call."""
        with self._job_done:
            finished, self._finished = self._finished, []
            self._is_woken = False
        return finished

    def wait(self, timeout: float) -> bool:
        """Wait for at most `timeout` seconds until `finished` has something to return, or for `wake`.

        Return whether one of the two has happened.
        """
        with self._job_done:
            return self._job_done.wait_for(lambda: bool(self._finished) or self._is_woken, timeout)

    def wake(self) -> None:
        """End the current or next `wait`, as a store has something for the engine's thread. From any thread."""
        with self._job_done:
            self._is_woken = True
            self._job_done.notify_all()

    def add_tier(self, tier: Tier) -> None:
        """Add a tier to fetch from, such as a loaded KV state. Nothing is saved to it. From any thread."""
        with self._job_queued:
            self._tiers += (tier,)
            self.counts.setdefault(tier.name, TierCounts())

    def remove_tier(self, tier: Tier) -> None:
        """Undo `add_tier`. From any thread."""
        with self._job_queued:
            self._tiers = tuple(other for other in self._tiers if other is not tier)

    def close(self, timeout: float = 5.0) -> None:
        """Cancel queued fetches, finish queued saves and jobs for at most `timeout` seconds, and cancel the rest."""
        deadline = time.monotonic() + timeout
        with self._job_queued:
            self._closed = True
            self._fetches.clear()
            self._job_queued.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._job_queued:
            while self._others:
                self._others.pop()[1].cancel()
        for tier in self._tiers:
            tier.close()

    def _submit(self, queue: deque[_Job], work: Callable[[], T], saves: int = 0) -> "Future[T]":
        future: Future[T] = Future()
        with self._job_queued:
            if self._closed:
                future.cancel()
            else:
                if not self._threads:
                    self._start_threads()
                queue.append((work, future))
                self.pending_saves += saves
                self._job_queued.notify()
        return future

    def _start_threads(self) -> None:
        for i in range(self._num_threads):
            self._threads.append(Thread(target=self._work, name=f"octavo-pages-{i}", daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        while job := self._next():
            work, future = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)

    def _next(self) -> _Job | None:
        with self._job_queued:
            self._job_queued.wait_for(lambda: self._fetches or self._others or self._closed)
            queue = self._fetches or self._others
            return queue.popleft() if queue else None

    def _save(self, page: int, key: bytes) -> None:
        began, ok = time.monotonic(), False
        try:
            content = self._backend.export_page(page)
            for tier in self._stores:
                is_written = tier.write(key, content)
                ok |= is_written
                self.counts[tier.name].bytes_written += content.nbytes if is_written else 0
        except Exception:
            _log.exception("a KV page could not be saved")
        if self._trace is not None:
            self._trace.slice("save page", SWAP, began, "KV transfers")
        with self._job_done:
            self.pending_saves -= 1
            self.pages_saved += ok
            self._finish(Finished("save", page, key, ok))

    def _touch(self, keys: Sequence[bytes]) -> None:
        for tier in self._stores:
            for key in reversed(keys):
                tier.touch(key)

    def _fetch(self, page: int, key: bytes) -> None:
        with self._job_done:
            if self._fetching == 0:
                self._last_fetch = time.perf_counter()
            self._fetching += 1
        began, ok = time.monotonic(), False
        try:
            contents = (self._read(tier, key) for tier in self._tiers if key in tier)
            content = next((found for found in contents if found is not None), None)
            if content is not None:
                self._backend.import_page(page, content)
                ok = True
        except Exception:
            _log.exception("a KV page could not be fetched")
        if self._trace is not None:
            self._trace.slice("fetch page", SWAP, began, "KV transfers")
        with self._job_done:
            self._fetching -= 1
            self.pages_fetched += ok
            self._measure(ok)
            self._finish(Finished("fetch", page, key, ok))

    def _read(self, tier: Tier, key: bytes) -> np.ndarray | None:
        """Read a page from a tier, and count it."""
        counts, began, content = self.counts[tier.name], time.perf_counter(), None
        try:
            content = tier.read(key)
        except Exception:
            counts.errors += 1
            raise
        counts.seconds += time.perf_counter() - began
        if content is None:
            counts.misses += 1
        else:
            counts.hits += 1
            counts.bytes_read += content.nbytes
        return content

    def _measure(self, ok: bool) -> None:
        """Update seconds_per_page with the time since the previous fetch ended (or this one began, if it was alone)."""
        now = time.perf_counter()
        if ok:
            weight = max(_SMOOTHING, 1 / self.pages_fetched)
            self.seconds_per_page += weight * (now - self._last_fetch - self.seconds_per_page)
        self._last_fetch = now

    def _finish(self, finished: Finished) -> None:
        self.failures += not finished.ok
        self._finished.append(finished)
        self._job_done.notify_all()
