"""Moves pages between the pool and the tiers below it, in threads of its own: no step ever waits for a disk."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Condition, Lock, Thread
from typing import Any, Literal, TypeVar

from octavo.backends.base import Backend

from .tiers.tier import Tier

T = TypeVar("T")
_Job = tuple[Callable[[], Any], "Future[Any]"]

_FIRST_GUESS = 1e9  # bytes per second; seconds_per_page until something has been fetched
_LATEST = 0.1  # the latest fetch's part in seconds_per_page

_log = logging.getLogger("octavo")


@dataclass(frozen=True, slots=True)
class Finished:
    """A transfer that is over, well (`ok`) or not. The page need not be held for it any longer."""

    kind: Literal["save", "fetch"]
    page: int
    key: bytes
    ok: bool


class Transfers:
    """The engine's thread asks for transfers and collects what is finished; neither blocks.

    A page must stay held from the request until it is in `finished()`. `tiers`: the quickest first. A page is saved to
    each of them, and fetched from the first that has it. Fetches go before saves, since somebody waits for them; there
    are never more of them than the pool has pages, and of saves at most `max_saves`.
    """

    def __init__(self, backend: Backend, tiers: Sequence[Tier], *, threads: int = 2, max_saves: int = 64):
        self.pages_saved = self.pages_fetched = self.failures = self.pending_saves = 0
        self.seconds_per_page = backend.page_bytes / _FIRST_GUESS  # of many fetches in a row
        self._backend, self._stores, self.max_saves = backend, tuple(tiers), max_saves
        self._tiers: tuple[Tier, ...] = self._stores  # and saved states
        lock = Lock()
        self._asked, self._done = Condition(lock), Condition(lock)
        self._fetches: deque[_Job] = deque()
        self._others: deque[_Job] = deque()
        self._finished: list[Finished] = []
        self._fetching, self._last_fetch = 0, 0.0
        self._closed = False
        self._num_threads = threads
        self._threads: list[Thread] = []  # from the first thing they are asked for

    @property
    def has_stores(self) -> bool:
        """Whether there is a tier to save to."""
        return bool(self._stores)

    def holds(self, key: bytes) -> Tier | None:
        """The first tier that has this page. O(1) per tier, without I/O."""
        return next((tier for tier in self._tiers if key in tier), None)

    def save(self, page: int, key: bytes) -> bool:
        """Begin to write a page to the tiers. False, and nothing begun: they have it, or too many saves are pending."""
        if self._closed or self.pending_saves >= self.max_saves or all(key in tier for tier in self._stores):
            return False
        self._ask(self._others, partial(self._save, page, key), saves=1)
        return True

    def fetch(self, page: int, key: bytes) -> bool:
        """Begin to fill a page. False, and nothing begun: no tier has its content."""
        if self._closed or self.holds(key) is None:
            return False
        self._ask(self._fetches, partial(self._fetch, page, key))
        return True

    def use(self, keys: Sequence[bytes]) -> None:
        """A sequence was given these pages, which lie one after another: tiers are to forget them late, the first last.

        Else what is always found in the pool would be the first to go below, and missing after a restart.
        """
        if keys and len(self._others) < self.max_saves:
            self._ask(self._others, partial(self._use, keys))

    def run(self, job: Callable[[], T]) -> "Future[T]":
        """Do something else that takes long, such as writing out a state, in turn with the saves."""
        return self._ask(self._others, job)

    def finished(self) -> list[Finished]:
        """What has been finished since the last call."""
        with self._done:
            finished, self._finished = self._finished, []
        return finished

    def wait(self, timeout: float) -> bool:
        """Wait until `finished` has something to give, at most `timeout` seconds; whether it has."""
        with self._done:
            return self._done.wait_for(lambda: bool(self._finished), timeout)

    def add_tier(self, tier: Tier) -> None:
        """One more to fetch from, as a saved state is; nothing is saved to it. From any thread, as `remove_tier`."""
        with self._asked:
            self._tiers += (tier,)

    def remove_tier(self, tier: Tier) -> None:
        with self._asked:
            self._tiers = tuple(other for other in self._tiers if other is not tier)

    def close(self, timeout: float = 5.0) -> None:
        """End the saves and jobs asked for, within `timeout` seconds, and drop what is left; fetches at once."""
        deadline = time.monotonic() + timeout
        with self._asked:
            self._closed = True
            self._fetches.clear()
            self._asked.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._asked:
            while self._others:
                self._others.pop()[1].cancel()
        for tier in self._tiers:
            tier.close()

    def _ask(self, queue: deque[_Job], work: Callable[[], T], saves: int = 0) -> "Future[T]":
        future: Future[T] = Future()
        with self._asked:
            if self._closed:
                future.cancel()
            else:
                if not self._threads:
                    self._start_threads()
                queue.append((work, future))
                self.pending_saves += saves
                self._asked.notify()
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
        with self._asked:
            self._asked.wait_for(lambda: self._fetches or self._others or self._closed)
            queue = self._fetches or self._others
            return queue.popleft() if queue else None

    def _save(self, page: int, key: bytes) -> None:
        ok = False
        try:
            content = self._backend.export_page(page)
            for tier in self._stores:
                ok |= tier.write(key, content)
        except Exception:
            _log.exception("a KV page could not be saved")
        with self._done:
            self.pending_saves -= 1
            self.pages_saved += ok
            self._finish(Finished("save", page, key, ok))

    def _use(self, keys: Sequence[bytes]) -> None:
        for tier in self._stores:
            for key in reversed(keys):
                tier.touch(key)

    def _fetch(self, page: int, key: bytes) -> None:
        with self._done:
            if self._fetching == 0:
                self._last_fetch = time.perf_counter()
            self._fetching += 1
        ok = False
        try:
            contents = (tier.read(key) for tier in self._tiers if key in tier)
            content = next((found for found in contents if found is not None), None)
            if content is not None:
                self._backend.import_page(page, content)
                ok = True
        except Exception:
            _log.exception("a KV page could not be fetched")
        with self._done:
            self._fetching -= 1
            self.pages_fetched += ok
            self._measure(ok)
            self._finish(Finished("fetch", page, key, ok))

    def _measure(self, ok: bool) -> None:
        """Learn from the time since the fetch before this one, or since there was none under way."""
        now = time.perf_counter()
        if ok:
            weight = max(_LATEST, 1 / self.pages_fetched)
            self.seconds_per_page += weight * (now - self._last_fetch - self.seconds_per_page)
        self._last_fetch = now

    def _finish(self, finished: Finished) -> None:
        self.failures += not finished.ok
        self._finished.append(finished)
        self._done.notify_all()
