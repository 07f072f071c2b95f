"""Window: the rate of a counter over the last seconds, however often it is read."""

import time
from collections import deque
from collections.abc import Callable

SECONDS = 10.0


class Window:
    """The increase of a counter since the latest reading that is at least SECONDS old, or since the oldest one.

    So several readers do not shorten each other's interval.
    """

    def __init__(self, value: float, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._readings = deque([(clock(), value)])

    def rate(self, value: float) -> float:
        """Add a reading, and return the increase per second."""
        now, readings = self._clock(), self._readings
        while len(readings) > 1 and now - readings[1][0] >= SECONDS:
            readings.popleft()
        then, before = readings[0]
        readings.append((now, value))
        return (value - before) / (now - then) if now > then else 0.0
