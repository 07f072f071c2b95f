"""Writing: store the pages that have become full, in a thread, behind the steps."""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from threading import Condition, Lock, Thread

from octavo.backends.base import Backend
from octavo.kv.page_pool import PagePool
from octavo.kv.tiers.counts import TierCounts
from octavo.kv.transfers import Finished

from .health import Health, reason_of
from .page_values import PageValues
from .store import Store, StoreRefused

MAX_BACKLOG = 8192  # pages that wait to be written; beyond it, new ones are dropped
_MAX_KNOWN = 65536  # pages that are remembered to be there, or not
_AT_ONCE = 32  # pages that are referenced while they wait for the thread
_ASKED_AT_ONCE = 256
_RENEWED = 60.0  # seconds after which the store is asked again for a page that is used
_PATIENCE = 1.0  # seconds without progress after which the pages that wait for the thread are given back
_PAUSE = 10.0  # seconds without writes after the store has refused a page

_log = logging.getLogger("octavo")


class Writing:
    """Writes pages to a store. The engine's thread offers keys, and calls `begin` and `finished` before each step.

    The store is asked first which pages it has, and keeps these longer: engines that compute or use the same page write
    it once, and a page lives for `ttl` seconds after its last use. A page is referenced only until its content has been
    copied. While the store is slow or down, keys wait, and beyond MAX_BACKLOG they are dropped: other pages replace
    them in the pool, and the store lacks them.

    Args:
        ttl: seconds that the store keeps a page.
        on_change: called by the thread when there is something for `begin` or `finished`.
    """

    def __init__(
        self,
        store: Store,
        values: PageValues,
        backend: Backend,
        health: Health,
        counts: TierCounts,
        *,
        ttl: float,
        on_change: Callable[[], None],
    ):
        self._store, self._values, self._backend, self._health = store, values, backend, health
        self._counts, self._ttl, self._on_change = counts, ttl, on_change
        self._renewed = min(_RENEWED, ttl / 4)
        self.pages_written = 0
        self._backlog: OrderedDict[bytes, None] = OrderedDict()  # keys, in order of arrival
        self._there: OrderedDict[bytes, float] = OrderedDict()  # keys of pages in the store, and when it said so
        self._lacking: OrderedDict[bytes, None] = OrderedDict()  # keys of pages that the store lacks, or has damaged
        self._job = Condition(Lock())
        self._to_ask: Sequence[bytes] = ()
        self._to_write: deque[tuple[int, bytes]] = deque()
        self._is_busy, self._is_closed, self._is_refused = False, False, False
        self._last_progress = self._paused_until = 0.0
        self._finished: list[Finished] = []
        self._buffer = bytearray()
        self._exporting = Lock()
        Thread(target=self._work, name="octavo-store-write", daemon=True).start()

    @property
    def is_moving(self) -> bool:
        """Return whether there is something to write that the store takes."""
        if self._finished or self._to_write:
            return True
        if self._is_busy:
            return time.monotonic() - self._last_progress < _PATIENCE
        return bool(self._backlog) and self._can_write

    @property
    def num_pending(self) -> int:
        """Return the number of pages that are being written, or wait for it."""
        return len(self._backlog) + len(self._to_write)

    def offer(self, keys: Iterable[bytes]) -> None:
        """Have the full pages with these keys, which are in the pool, written or kept longer."""
        oldest = time.monotonic() - self._renewed
        for key in keys:
            if self._there.get(key, 0.0) <= oldest and len(self._backlog) < MAX_BACKLOG:
                self._backlog[key] = None

    def begin(self, pool: PagePool, max_pages: int) -> list[int]:
        """Give the thread its next work, if it has none: pages of the pool, at most `max_pages`.

        Returns the pages, which have been acquired.
        """
        if self._is_busy or not self._backlog or not self._can_write:
            return []
        pages: list[tuple[int, bytes]] = []
        questions: list[bytes] = []
        with self._job:
            for key in list(islice(self._backlog, _ASKED_AT_ONCE)):
                if key not in self._lacking:
                    questions.append(key)
                elif len(pages) < min(_AT_ONCE, max_pages):
                    del self._backlog[key], self._lacking[key]
                    if (page := pool.find(key)) is not None:
                        pool.acquire(page)
                        pages.append((page, key))
            self._to_ask, self._to_write = questions, deque(pages)
            self._is_busy, self._last_progress = bool(pages or questions), time.monotonic()
            self._job.notify()
        return [page for page, _ in pages]

    def finished(self) -> list[Finished]:
        """Return the acquired pages that are no longer needed since the last call."""
        with self._job:
            if self._to_write and time.monotonic() - self._last_progress > _PATIENCE:
                self._give_back()
            finished, self._finished = self._finished, []
        return finished

    def note_lacking(self, keys: Iterable[bytes]) -> None:
        """Note that the store does not have pages, or has them damaged: they are to be written. From any thread."""
        with self._job:
            for key in keys:
                self._there.pop(key, None)
                self._lacking[key] = None
            while len(self._lacking) > _MAX_KNOWN:
                self._lacking.popitem(last=False)

    def forget(self) -> None:
        """Forget which pages the store has, as it may have lost them. From any thread."""
        with self._job:
            self._there.clear()

    def close(self) -> None:
        """Write no more, and give back all pages."""
        with self._job:
            self._is_closed = True
            self._give_back()
            self._job.notify()
        with self._exporting:  # the thread does not use the backend from now on
            pass

    @property
    def _can_write(self) -> bool:
        return self._health.is_up and not self._is_closed and time.monotonic() >= self._paused_until

    def _give_back(self) -> None:
        self._finished += [Finished("save", page, key, ok=False) for page, key in self._to_write]
        self._to_write.clear()

    def _work(self) -> None:
        while True:
            with self._job:
                self._job.wait_for(lambda: self._is_busy or self._is_closed)
                if self._is_closed:
                    return
            try:
                self._write()
                self._ask()
            except Exception as error:
                self._failed(error)
            with self._job:
                self._give_back()
                self._to_ask, self._is_busy = (), False
            self._on_change()

    def _write(self) -> None:
        while True:
            with self._job:
                if not self._to_write:
                    return
                page, key = self._to_write.popleft()
                self._last_progress = time.monotonic()
            try:
                with self._exporting:
                    if self._is_closed:
                        return
                    value = self._values.seal(key, self._backend.export_page(page), self._buffer)
            finally:
                with self._job:
                    self._finished.append(Finished("save", page, key, ok=True))
            self._store.set(self._values.name(key), value, self._ttl)
            self._note_there([key])
            self._is_refused = False
            self.pages_written += 1
            self._counts.bytes_written += self._backend.page_bytes

    def _ask(self) -> None:
        """Ask the store which pages it has, so that `begin` returns the others next."""
        if not (keys := self._to_ask):
            return
        self._last_progress = time.monotonic()
        answers = list(self._store.renew([self._values.name(key) for key in keys], self._ttl))
        if len(answers) != len(keys):
            raise ValueError(f"it has answered {len(keys)} questions with {len(answers)} answers")
        self._note_there([key for key, is_there in zip(keys, answers, strict=True) if is_there])
        self.note_lacking(key for key, is_there in zip(keys, answers, strict=True) if not is_there)

    def _note_there(self, keys: Iterable[bytes]) -> None:
        now = time.monotonic()
        with self._job:
            for key in keys:
                if key not in self._lacking:  # otherwise it is damaged there
                    self._backlog.pop(key, None)
                    self._there[key] = now
                    self._there.move_to_end(key)
            while len(self._there) > _MAX_KNOWN:
                self._there.popitem(last=False)

    def _failed(self, error: Exception) -> None:
        if self._is_closed:
            return
        self._counts.errors += 1
        if not isinstance(error, StoreRefused):
            self._health.failed(reason_of(error))
            return
        self._paused_until = time.monotonic() + _PAUSE
        if not self._is_refused:
            self._is_refused = True
            _log.warning("kv_store: the store takes no pages (%s); it is still read", error)
