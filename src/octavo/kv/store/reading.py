"""Reading: look up and fetch the pages of waiting sequences from other engines and a store, in two threads."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from threading import Condition, Lock, RLock, Thread

from octavo.backends.base import Backend
from octavo.kv.tiers.counts import TierCounts
from octavo.kv.transfers import Finished

from .health import Health, reason_of
from .shared_pages import SharedPages, Value

PATIENCE = 0.08  # seconds that a sequence waits for a look-up and the next page from the store together
_LATE = 0.25  # seconds after which an answer makes the store count as down
_STUCK = 2.0  # the same for no answer at all; then the call does not even end with an error
_BATCH_BYTES = 2**23  # asked for at a time
_INITIAL_SPEED = 1e9  # bytes per second, until pages have been fetched
_SMOOTHING = 0.3  # weight of the latest measurement
_VALID = 10.0  # seconds for which a measured speed counts; then the store may show again how fast it is


@dataclass(slots=True, eq=False)
class Lookup:
    """A question which pages a store has.

    Attributes:
        keys: of successive pages of one sequence.
        found: the first of `keys`, as far as the store has them; empty until it has answered.
        is_done: whether the sequence need no longer wait.
        is_answered: whether the store has answered, or never will.
        seconds: time until it was answered, or found to be late.
    """

    keys: Sequence[bytes]
    found: frozenset[bytes] = frozenset()
    is_done: bool = False
    is_answered: bool = False
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class Fetch:
    """Pages of one sequence on their way from a store.

    Attributes:
        left: pages that have not arrived yet, by key, in order.
        seconds_to_compute: time in which a page would be computed; None if it is not known.
        waited: seconds that the sequence has waited for the look-up.
        num_arrived: number of pages that have arrived.
        is_late: whether the sequence no longer waits for them.
    """

    left: dict[bytes, int]
    seconds_to_compute: float | None
    waited: float = 0.0
    began: float = field(default_factory=time.monotonic)
    num_arrived: int = 0
    is_late: bool = False


class Reading:
    """Asks a store, or other engines, for pages: what is said of the store here holds for them too.

    The engine's thread begins look-ups and fetches, and calls `finished` before each step.

    A sequence waits until the store has sent nothing for PATIENCE seconds, of this sequence or of others, whose pages
    may come first; and, once it has waited for so long in all, only while its pages come faster than they would be
    computed. Then it is computed, but the call goes on: pages that come before they are computed are still used.

    A page must stay referenced until `finished` returns it. A page that the store has not begun to send is returned as
    soon as it is given up, so a store that hangs holds no pages.

    Args:
        pages: what others have.
        on_change: called by the threads when there is something for `finished`, or a look-up is done.
        on_loss: called with the keys of pages that the store does not have, or that are damaged there.
        on_return: called when the store answers again after a failure.
    """

    def __init__(
        self,
        pages: SharedPages,
        backend: Backend,
        health: Health,
        *,
        on_change: Callable[[], None],
        on_loss: Callable[[Sequence[bytes]], None],
        on_return: Callable[[], None],
    ):
        self._pages, self._backend, self._health = pages, backend, health
        self._store_counts = pages.counts.get("store", TierCounts())
        self._on_change, self._on_loss, self._on_return = on_change, on_loss, on_return
        self._lock = RLock()
        self._asked, self._ordered = Condition(self._lock), Condition(self._lock)
        self._lookups: deque[Lookup] = deque()
        self._open_lookups: list[Lookup] = []  # that sequences wait for
        self._orders: deque[Fetch] = deque()
        self._fetches: list[Fetch] = []  # with pages that have not arrived
        self._finished: list[Finished] = []
        self._asking_since: float | None = None
        self._reading_since: float | None = None  # when the store has last sent a page, while it owes another one
        self._last_page = 0.0  # when the store has last sent a page
        self._latency, self._seconds_per_byte, self._measured = 0.0, 1 / _INITIAL_SPEED, 0.0
        self._is_closed = False
        self._importing = Lock()
        health.on_failure = self._wake
        for target in (self._ask, self._read):
            Thread(target=target, name=f"octavo-store-{target.__name__.strip('_')}", daemon=True).start()

    @property
    def is_available(self) -> bool:
        """Return whether the store can be asked now: it is up, and does not owe an answer for long."""
        return self._health.is_up and self._seconds_owed < PATIENCE

    @property
    def is_moving(self) -> bool:
        """Return whether a sequence waits for the store."""
        return bool(self._open_lookups or self._finished or any(not fetch.is_late for fetch in list(self._fetches)))

    def seconds_per_page(self, pages: int) -> float:
        """Return the expected time per page to look up and fetch so many pages, in seconds."""
        is_valid = time.monotonic() - self._measured < _VALID
        per_byte = self._seconds_per_byte if is_valid else 1 / _INITIAL_SPEED
        return per_byte * self._backend.page_bytes + 2 * self._latency / pages

    def look_up(self, keys: Sequence[bytes]) -> Lookup:
        """Begin to ask which of the pages with these keys, successive ones of a sequence, the store has."""
        lookup = Lookup(keys)
        with self._lock:
            self._lookups.append(lookup)
            self._open_lookups.append(lookup)
            self._asked.notify()
        return lookup

    def fetch(self, pages: Sequence[tuple[int, bytes]], seconds_to_compute: float | None, waited: float) -> Fetch:
        """Begin to fill pages, given with their keys in the order of their positions.

        Args:
            seconds_to_compute: time in which a page would be computed; None if it is not known. The fetch is late
                when it turns out to be slower.
            waited: seconds that the sequence has waited for the look-up.
        """
        fetch = Fetch({key: page for page, key in pages}, seconds_to_compute, waited)
        with self._lock:
            self._orders.append(fetch)
            self._fetches.append(fetch)
            self._ordered.notify()
        return fetch

    def give_up(self, fetch: Fetch) -> None:
        """Fetch no more pages, as nobody waits for them. `finished` returns them at once."""
        with self._lock:
            self._cancel(fetch)

    def skip(self, fetch: Fetch, keys: Iterable[bytes]) -> None:
        """Do not fetch these pages, which the sequence computes. `finished` returns them at once."""
        with self._lock:
            skipped = [(page, key) for key in keys if (page := fetch.left.pop(key, None)) is not None]
            self._finished += [Finished("fetch", page, key, ok=False) for page, key in skipped]

    def finished(self) -> list[Finished]:
        """Return the pages that have arrived or were given up since the last call."""
        with self._lock:
            finished, self._finished = self._finished, []
        return finished

    def late(self) -> list[Fetch]:
        """Return the fetches that sequences are not to wait for any longer. The same holds for late look-ups."""
        with self._lock:
            now = time.monotonic()
            for lookup in self._open_lookups:
                if not lookup.is_done and now - lookup.began > PATIENCE:
                    lookup.is_done, lookup.seconds = True, now - lookup.began
            self._open_lookups = [lookup for lookup in self._open_lookups if not lookup.is_done]
            late = [fetch for fetch in self._fetches if not fetch.is_late and self._is_too_slow(fetch, now)]
            for fetch in late:
                fetch.is_late = True
        if self._seconds_owed > _STUCK:
            self._health.hangs(f"it has not answered for {_STUCK:g} s")
        return late

    def close(self) -> None:
        """End the threads when their calls have returned, and return the pages of all fetches."""
        with self._lock:
            self._is_closed = True
            for fetch in list(self._fetches):
                self._cancel(fetch)
            for lookup in self._open_lookups:
                lookup.is_done = True
            self._asked.notify_all()
            self._ordered.notify_all()
        with self._importing:  # no thread uses the backend from now on
            pass

    @property
    def _seconds_owed(self) -> float:
        """Return for how long the store owes an answer, or a page; 0 if it owes none."""
        since = [begun for begun in (self._asking_since, self._reading_since) if begun is not None]
        return time.monotonic() - min(since) if since else 0.0

    def _is_too_slow(self, fetch: Fetch, now: float) -> bool:
        """Return whether no pages come, of any fetch, or those of this one come slower than they would be computed."""
        patience = PATIENCE if fetch.num_arrived else PATIENCE - fetch.waited
        if now - max(fetch.began, self._last_page) > patience:
            return True
        if fetch.seconds_to_compute is None or now - fetch.began < PATIENCE:
            return False
        return (now - fetch.began) / max(fetch.num_arrived, 1) > fetch.seconds_to_compute

    def _cancel(self, fetch: Fetch) -> None:
        """Give back all pages of a fetch that have not begun to arrive. The caller holds the lock."""
        self._finished += [Finished("fetch", page, key, ok=False) for key, page in fetch.left.items()]
        fetch.left.clear()
        if fetch in self._fetches:
            self._fetches.remove(fetch)

    def _wake(self) -> None:
        """Make the thread that probes the store look at the time of the next probe."""
        with self._lock:
            self._asked.notify()

    def _ask(self) -> None:
        """Answer look-ups, and probe the store at the start and while it is down."""
        self._probe()
        while True:
            with self._lock:
                if not self._lookups and not self._is_closed:
                    self._asked.wait(self._health.seconds_to_probe)
                if self._is_closed:
                    return
                lookup = self._lookups.popleft() if self._lookups else None
                if lookup is not None and (lookup.is_done or not self._health.is_up):
                    lookup.is_done = lookup.is_answered = True
                    continue
            if lookup is not None:
                self._answer(lookup)
            elif self._health.seconds_to_probe == 0.0:
                self._probe()

    def _answer(self, lookup: Lookup) -> None:
        found: list[bytes] = []
        try:
            answers, seconds = self._timed(lookup.keys)
            for key, is_there in zip(lookup.keys, answers, strict=False):
                if not is_there:
                    break
                found.append(key)
            self._latency += _SMOOTHING * (seconds - self._latency)
            if seconds > _LATE:
                self._health.failed(f"it answers after {seconds:.2f} s")
            self._on_loss([key for key, is_there in zip(lookup.keys, answers, strict=False) if not is_there])
            with self._lock:
                self._store_counts.misses += len(lookup.keys) - len(found)
        except Exception as error:
            self._failed(error)
        lookup.found, lookup.is_answered = frozenset(found), True  # for a sequence that is being computed, too
        if not lookup.is_done:
            lookup.is_done, lookup.seconds = True, time.monotonic() - lookup.began
        self._on_change()

    def _probe(self) -> None:
        was_up = self._health.is_up
        try:
            _, seconds = self._timed([])
        except Exception as error:
            with self._lock:
                self._store_counts.errors += 1
            self._health.probe_failed(reason_of(error))
            return
        if self._seconds_owed > _LATE or seconds > _LATE:
            self._health.probe_failed(f"it answers after {max(seconds, self._seconds_owed):.2f} s")
            return
        self._latency = seconds
        self._health.probe_succeeded()
        if not was_up:
            self._on_return()

    def _timed(self, keys: Sequence[bytes]) -> tuple[Sequence[bool], float]:
        """Return which pages there are, and how long it took to answer; see `SharedPages.has`."""
        self._asking_since = began = time.monotonic()
        try:
            answers = self._pages.has(keys)
        finally:
            self._asking_since = None
        return answers, time.monotonic() - began

    def _read(self) -> None:
        """Carry out fetches, one after another."""
        while True:
            with self._lock:
                self._ordered.wait_for(lambda: self._orders or self._is_closed)
                if self._is_closed:
                    break
                fetch = self._orders.popleft()
                self._reading_since = time.monotonic()
            try:
                while self._read_batch(fetch):
                    pass
            except Exception as error:
                self._failed(error)
            self._reading_since = None
            with self._lock:
                self._cancel(fetch)
            self._on_change()
        self._pages.end_reading()

    def _read_batch(self, fetch: Fetch) -> bool:
        """Fetch the next pages. Return whether they were there, and more may be left."""
        with self._lock:
            batch = list(islice(fetch.left, max(1, _BATCH_BYTES // self._backend.page_bytes)))
        if not batch:
            return False
        began, sent = time.monotonic(), 0
        counts = self._store_counts
        try:
            for key, (value, counts) in zip(batch, self._pages.get(batch), strict=False):
                self._reading_since = self._last_page = time.monotonic()
                sent += value is not None
                if not self._take(fetch, key, value, counts):
                    return False
        finally:
            self._measure(sent * self._backend.page_bytes, time.monotonic() - began, counts)
        return sent == len(batch)

    def _take(self, fetch: Fetch, key: bytes, value: Value | None, counts: TierCounts) -> bool:
        """Fill the page of a key with its value. Return whether the pages that follow are needed, and may be there."""
        with self._lock:
            if not fetch.left:  # given up
                return False
            if (page := fetch.left.pop(key, None)) is None:  # skipped
                return True
        ok = False
        try:
            content = None if value is None else self._pages.open(key, value)
            with self._importing:
                if content is not None and not self._is_closed:
                    self._backend.import_page(page, content)
                    ok = True
        finally:
            with self._lock:
                self._finished.append(Finished("fetch", page, key, ok))
                self._count(counts, value is not None, ok)
        if ok:
            fetch.num_arrived += 1
        elif counts is self._store_counts:
            self._on_loss([key])
        return ok

    def _count(self, counts: TierCounts, is_there: bool, ok: bool) -> None:
        counts.hits += ok
        counts.misses += not is_there
        counts.errors += is_there and not ok
        counts.bytes_read += self._backend.page_bytes if ok else 0

    def _measure(self, size: int, seconds: float, counts: TierCounts) -> None:
        with self._lock:
            counts.seconds += seconds
        if size:
            latest, now = seconds / size, time.monotonic()
            weight = _SMOOTHING if now - self._measured < _VALID else 1.0
            self._seconds_per_byte += weight * (latest - self._seconds_per_byte)
            self._measured = now

    def _failed(self, error: Exception) -> None:
        if self._is_closed:
            return
        with self._lock:
            self._store_counts.errors += 1
        self._health.failed(reason_of(error))
