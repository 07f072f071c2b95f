"""Faults of engines: what may happen to one, how often, and for how long."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from octavo.errors import ConfigError
from octavo.frontend.replica import SILENT_TICKS, TICK
from octavo.simulation.trace import parse_rate

SILENCE = SILENT_TICKS * TICK  # seconds until an engine without messages counts as lost
PARTITION_SECONDS = 30.0
SLOW_SECONDS, SLOWDOWN = 300.0, 3.0


class Fault(StrEnum):
    """What may happen to an engine.

    - kill: its process or machine ends, which its frontend notices at once. A new engine with an empty cache replaces
      it.
    - suspend: it stops without a sign. The frontend notices after SILENCE, ends it, and it is replaced.
    - partition: no message passes for PARTITION_SECONDS. The frontend notices after SILENCE. Then the engine is back,
      with its cache; answers to requests that went on elsewhere are dropped.
    - slow: its steps take SLOWDOWN times as long for SLOW_SECONDS.
    """

    KILL = "kill"
    SUSPEND = "suspend"
    PARTITION = "partition"
    SLOW = "slow"


@dataclass(frozen=True)
class Faults:
    """Rates of faults of each engine, per second, and a seed: the same seed gives the same faults."""

    rates: dict[Fault, float]
    seed: int = 0

    def of_engine(self, engine: int, cell: int) -> Iterator[tuple[float, Fault]]:
        """Yield the times of an engine's faults, in seconds: a Poisson process."""
        total, at = sum(self.rates.values()), 0.0
        rng = random.Random(f"{self.seed} {cell} {engine}")
        while total:
            at += rng.expovariate(total)
            yield at, rng.choices([*self.rates], [*self.rates.values()])[0]


def parse_faults(text: str, seed: int = 0) -> Faults:
    """Return the faults of a text such as "kill=1/day,slow=0.1/hour". Raises ConfigError."""
    rates = dict[Fault, float]()
    for part in text.split(","):
        name, _, rate = part.strip().partition("=")
        if name not in [*Fault] or not rate:
            raise ConfigError(
                f"--faults must be rates per engine of {', '.join(Fault)}, such as kill=1/day,slow=2/day, not {text!r}"
            )
        rates[Fault(name)] = parse_rate(rate)
    return Faults(rates, seed)
