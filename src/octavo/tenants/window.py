"""SlidingWindow: an exact limit on what happens in any period of a given length."""

from collections import deque


class SlidingWindow:
    """Allows `limit` events in any `seconds`. Times are in seconds of any clock that does not go back.

    It keeps the time of each event: so who stays within the limit is never refused, and nobody gets more. (A bucket
    that is refilled allows up to twice the limit in a period, or refuses bursts within it.)
    """

    def __init__(self, limit: int, seconds: float = 60.0):
        self.limit, self.seconds = limit, seconds
        self._times: deque[float] = deque()

    def take(self, now: float) -> float:
        """Count an event if it is allowed. Return 0, or the seconds after which the next one is."""
        self._forget(now)
        if len(self._times) < self.limit:
            self._times.append(now)
            return 0.0
        return self._times[len(self._times) - self.limit] + self.seconds - now

    def remaining(self, now: float) -> int:
        """Return how many events are allowed at once."""
        self._forget(now)
        return max(0, self.limit - len(self._times))

    def seconds_until_empty(self, now: float) -> float:
        """Return after how many seconds the whole limit is available again."""
        self._forget(now)
        return self._times[-1] + self.seconds - now if self._times else 0.0

    def _forget(self, now: float) -> None:
        while self._times and self._times[0] + self.seconds <= now:
            self._times.popleft()
