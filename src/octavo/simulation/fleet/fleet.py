"""A fleet in virtual time: cells of one frontend and its engines each, which are simulated one after another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.simulation.costs import CostModel
from octavo.simulation.trace import TraceRequest

from .autoscaling import Autoscaling
from .cell import Cell
from .faults import Faults
from .load import Load
from .record import Done

WARM_UP = 0.25  # share of the time


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Limits of autoscaling, for the whole fleet: see Autoscaling."""

    most: int
    target: float


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A fleet whose frontends share the engines evenly. Each engine belongs to one frontend.

    Attributes:
        pages: pages of the KV cache of each engine.
        engines, frontends: their numbers.
        cells: number of cells that are simulated, the first ones; the others are taken to be like them.
        until: seconds after which no more requests arrive; the first WARM_UP of this time does not count in latencies
            and rates. By default, all requests arrive and count.
        start_seconds: from the loss of an engine, or the decision to add one, until a new one is ready.
    """

    config: EngineConfig
    costs: CostModel
    pages: int
    engines: int
    frontends: int = 1
    cells: int | None = None
    start_seconds: float = 60.0
    faults: Faults | None = None
    scaling: Scaling | None = None
    until: float | None = None

    def __post_init__(self) -> None:
        if self.frontends > self.engines:
            raise ConfigError(f"{self.engines} engines cannot have {self.frontends} frontends: give fewer --frontends")
        if self.cells is not None and self.cells > self.frontends:
            raise ConfigError(f"--cells must be at most the number of frontends, {self.frontends}, not {self.cells}")
        if self.scaling is not None and self.scaling.most < self.engines:
            raise ConfigError(
                f"--max-engines must be at least the number of engines at the start, {self.engines}, "
                f"not {self.scaling.most}"
            )
        if self.config.kv_disk or self.config.kv_host_memory:
            raise ConfigError("a simulated fleet has no tiers below the KV cache; leave out kv_disk and kv_host_memory")

    def simulate(self, load: Load, advance: Callable[[int], None] = lambda cells: None) -> Done:
        """Serve the requests of the cells to be simulated.

        Args:
            advance: called with 1 after each cell.
        """
        done = Done(self.frontends, 0.0 if self.until is None else WARM_UP * self.until, self.until)
        for number in range(self.cells if self.cells is not None else self.frontends):
            requests = load.cell(number, self.frontends)
            if requests:
                done.add(*self._cell(requests, number).run())
            advance(1)
        return done

    def _cell(self, requests: Sequence[TraceRequest], number: int) -> Cell:
        engines, scaling = self._share(self.engines, number), self.scaling
        return Cell(
            requests,
            self.config,
            self.costs,
            self.pages,
            engines,
            self.start_seconds,
            self.faults,
            Autoscaling(engines, self._share(scaling.most, number), scaling.target) if scaling else None,
            number,
            self.until,
        )

    def _share(self, engines: int, number: int) -> int:
        """Return a cell's part of so many engines; the first cells have one more if they do not divide evenly."""
        return engines // self.frontends + (number < engines % self.frontends)
