"""What other programs take from this machine's processors while steps are measured."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from octavo.machine import busy_seconds

NOTABLE = 0.15  # processors


@dataclass
class Disturbance:
    """The processors that other programs kept busy, in the mean of some time; 0 if unknown."""

    processors: float = 0.0

    @property
    def is_notable(self) -> bool:
        return self.processors > NOTABLE


@contextmanager
def watched() -> Iterator[Disturbance]:
    """Measure the disturbance while the context is open; the result is known at its end."""
    result = Disturbance()
    others, since = _seconds_of_others(), time.monotonic()
    yield result
    seconds = max(time.monotonic() - since, 1e-3)
    result.processors = max(0.0, (_seconds_of_others() - others) / seconds)


def _seconds_of_others() -> float:
    """Return the seconds for which the cores that this process may use were busy with other programs."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return sum(busy_seconds().values()) - usage.ru_utime - usage.ru_stime
