"""Health: whether a store may be asked, and when to ask again after a failure."""

import logging
import time
from collections.abc import Callable
from threading import Lock

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0  # seconds

_log = logging.getLogger("octavo")


def reason_of(error: Exception) -> str:
    """Return one line about an error."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__).splitlines()[0]


class Health:
    """Whether a store answers in time. Thread-safe.

    After a failure, the store is only asked by a probe, after a pause that doubles with each probe that fails. So a
    single late answer costs a quarter of a second, and a lost store one small question every 10 seconds. When the first
    probe has failed too, this is logged, once until the store answers again.

    Args:
        store: what the log calls it.

    Attributes:
        on_failure: called, by the thread that notes it, when the store is down from now on.
    """

    def __init__(self, store: str):
        self._store = store
        self._lock = Lock()
        self._failures, self._is_known = 0, False
        self._probe_at = 0.0
        self.on_failure: Callable[[], None] = lambda: None

    @property
    def is_up(self) -> bool:
        return not self._failures

    @property
    def seconds_to_probe(self) -> float | None:
        """Return the time until the store should be probed, 0 if it is over; None while the store is up."""
        return max(0.0, self._probe_at - time.monotonic()) if self._failures else None

    def failed(self, reason: str) -> None:
        """Note that a call failed or is late. Calls that fail while the store is down, but for probes, do not count."""
        if self.is_up:
            self._fail(reason)
            self.on_failure()

    def hangs(self, reason: str) -> None:
        """Note that a call does not return. This is logged at once, as the thread that probes may be held by it too."""
        if not self._is_known:
            self._fail(reason, is_certain=True)
            self.on_failure()

    def probe_failed(self, reason: str) -> None:
        """Note that a probe failed, or was answered late."""
        self._fail(reason)

    def probe_succeeded(self) -> None:
        """Note that a probe was answered in time."""
        with self._lock:
            was_known, self._is_known, self._failures = self._is_known, False, 0
        if was_known:
            _log.warning("kv_store: %s can be used again", self._store)

    def _fail(self, reason: str, is_certain: bool = False) -> None:
        with self._lock:
            self._failures += 1
            self._probe_at = time.monotonic() + min(_FIRST_PAUSE * 2 ** min(self._failures - 1, 10), _LONGEST_PAUSE)
            is_new = (is_certain or self._failures > 1) and not self._is_known
            self._is_known |= is_new
        if is_new:
            _log.warning("kv_store: %s cannot be used (%s); pages are computed until it can", self._store, reason)
