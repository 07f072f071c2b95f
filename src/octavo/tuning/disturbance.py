"""What other programs take from this machine's processors while steps are measured."""

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
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
    busy, mine, since = _busy_seconds(), _own_seconds(), time.monotonic()
    yield result
    seconds = max(time.monotonic() - since, 1e-3)
    result.processors = max(0.0, (_busy_seconds() - busy - (_own_seconds() - mine)) / seconds)


def _busy_seconds(stat: Path = STAT) -> float:
    """Return the seconds for which the processors that this process may use were busy or lent to other machines."""
    allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return 0.0
    # The columns are: user, nice, system, idle, waiting for disks, interrupts (2), stolen.
    ticks = sum(int(w[i]) for w in lines if w and w[0] in allowed and len(w) > 8 for i in (1, 2, 3, 6, 7, 8))
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
