"""Admission control: limit the completions in a server, and tell refused clients when to retry."""

import math
import time
from collections.abc import Callable

from octavo.errors import InvalidRequest, QueueFull

UNKNOWN_PACE = 1.0  # seconds until a place becomes free, as long as none is measured
MEMORY = 256  # number of latest places that dominate the measurement
MIN_WAIT, MAX_WAIT = 1, 60  # seconds in Retry-After; the openai client ignores values above 60


class Admission:
    """Admits at most `at_once` running completions and `queue` waiting ones.

    Refused requests get different retry times, so that they do not all come back at once: the time until places have
    become free for all requests that were refused before, and for this one. The rate at which places become free is
    measured only while there is a queue: an engine with less work would seem slower than it is.
    """

    def __init__(self, at_once: int, queue: int, clock: Callable[[], float] = time.monotonic):
        self.refused = 0  # requests, since the start
        self._queue = queue
        self.resize(at_once)
        self._clock = clock
        self._promised = 0  # places that refused requests were promised and that are not free yet
        self._seconds = 0.0  # measured time with a queue
        self._freed = 0.0  # places that became free in this time
        self._last = 0.0  # end of the measured time

    def resize(self, at_once: int) -> None:
        """Change the number of running completions."""
        self._at_once, self.limit = at_once, at_once + self._queue

    def check(self, live: int, asked: int) -> None:
        """Check whether `asked` completions may join the `live` ones.

        Raises QueueFull if there is currently no place for them, InvalidRequest if they would be too many even alone.
        """
        if asked > self.limit:
            raise InvalidRequest(
                f"{asked} completions in one call exceed the limit of {self.limit} (max_batch_size plus max_queue)"
            )
        if live <= self._at_once:
            self._last = self._clock()
        if live + asked <= self.limit:
            return
        self.refused += 1
        self._promised += live + asked - self.limit
        pace = self._seconds / self._freed if self._freed else UNKNOWN_PACE
        wait = min(max(math.ceil(self._promised * pace), MIN_WAIT), MAX_WAIT)
        raise QueueFull(f"the queue is full, with {live} completions; try again in {wait} s", wait)

    def left(self, places: int, live: int) -> None:
        """Note that `places` of the `live` completions have just ended."""
        if not places:
            return
        self._promised = max(self._promised - places, 0)
        now = self._clock()
        if live > self._at_once:
            self._seconds += now - self._last
            self._freed += places
            if self._freed > MEMORY:
                self._seconds, self._freed = self._seconds / 2, self._freed / 2
        self._last = now
