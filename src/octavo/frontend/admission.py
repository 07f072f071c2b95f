"""Who is let in: a bound on the completions that live in a server, and a time at which the refused may come again."""

import math
import time
from collections.abc import Callable

import msgspec

from octavo.errors import InvalidRequest, QueueFull

UNKNOWN_PACE = 1.0  # seconds for one place to become free, before it was measured
MEMORY = 256  # places: what was measured before the last so many counts little
MIN_WAIT, MAX_WAIT = 1, 60  # seconds that a refused client is told to wait; the openai client heeds up to 60


class FrontendStats(msgspec.Struct, frozen=True):
    """`live`: completions that run or wait, of at most `limit`. Requests since the start: refused, and timed out."""

    live: int
    limit: int
    refused: int
    timed_out: int


class Admission:
    """At most `at_once` completions that run and `queue` that wait.

    The refused are told different times, so that they do not all come back at once: each is to come when places will
    have become free for all who were refused before it, and for itself. How fast places become free is measured
    while there is a queue; with less to do than it could, an engine would seem slower than it is.
    """

    def __init__(self, at_once: int, queue: int, clock: Callable[[], float] = time.monotonic):
        self.limit = at_once + queue
        self.refused = 0  # requests, since the start
        self._at_once = at_once
        self._clock = clock
        self._promised = 0  # places for those who were refused, not become free yet
        self._seconds = 0.0  # in which, while there was a queue,
        self._freed = 0.0  # so many places became free
        self._last = 0.0  # time up to which that is measured

    def check(self, live: int, asked: int) -> None:
        """May `asked` completions join the `live` ones? Raises QueueFull, or InvalidRequest if they never can."""
        if asked > self.limit:
            limits = f"the {self.limit} that may be here at once (max_batch_size and max_queue)"
            raise InvalidRequest(f"{asked} completions in one call are more than {limits}")
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
        """Of `live` completions, so many have just left."""
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
