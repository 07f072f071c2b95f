"""SlidingWindow: an exact limit on what happens in any period of a given length."""

from collections import deque
from dataclasses import dataclass
from math import inf


@dataclass(slots=True, eq=False)
class Entry:
    """An event in a window: when it happened, and how much it counts."""

    time: float
    amount: int
    is_inside: bool = True


class SlidingWindow:
    """Allows events of at most `limit` together in any `seconds`. Times are in seconds of any clock.

    It keeps each event: so who stays within the limit is never refused, and nobody gets more. (A bucket that is
    refilled allows up to twice the limit in a period, or refuses bursts within it.)
    """

    def __init__(self, limit: int, seconds: float = 60.0):
        self.limit, self.seconds = limit, seconds
        self.total = 0  # of the events in the window when it was last asked
        self._entries: deque[Entry] = deque()

    def wait(self, now: float, amount: int = 1) -> float:
        """Return the seconds after which an event is allowed: 0 if it is now; infinity if it alone is too much."""
        self._forget(now)
        if amount > self.limit:
            return inf
        excess = self.total + amount - self.limit
        if excess <= 0:
            return 0.0
        for entry in self._entries:
            excess -= entry.amount
            if excess <= 0:
                return entry.time + self.seconds - now
        raise AssertionError("without events, any that is not too much alone is allowed")

    def add(self, now: float, amount: int = 1) -> Entry:
        """Count an event, whether or not it is allowed."""
        entry = Entry(now, amount)
        self._entries.append(entry)
        self.total += amount
        return entry

    def take(self, now: float) -> float:
        """Count an event if it is allowed. Return 0, or the seconds after which the next one is."""
        wait = self.wait(now)
        if wait == 0:
            self.add(now)
        return wait

    def change(self, entry: Entry, amount: int) -> None:
        """Correct what an event counts. Does nothing to the window if the event has left it."""
        if entry.is_inside:
            self.total += amount - entry.amount
        entry.amount = amount

    def remaining(self, now: float) -> int:
        """Return how much is allowed at once."""
        self._forget(now)
        return max(0, self.limit - self.total)

    def seconds_until_empty(self, now: float) -> float:
        """Return after how many seconds the whole limit is available again."""
        self._forget(now)
        return self._entries[-1].time + self.seconds - now if self._entries else 0.0

    def _forget(self, now: float) -> None:
        while self._entries and self._entries[0].time + self.seconds <= now:
            entry = self._entries.popleft()
            entry.is_inside = False
            self.total -= entry.amount
