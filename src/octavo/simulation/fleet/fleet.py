"""A fleet in virtual time: cells of one frontend and its engines each, which are simulated one after another."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.simulation.conversations import Conversations
from octavo.simulation.costs import CostModel
from octavo.simulation.trace import TraceRequest, poisson_trace

from .autoscaling import Autoscaling
from .cell import Cell
from .faults import Faults
from .record import Done

CellTrace = Callable[[int, int], list[TraceRequest]]
"""Returns the requests of a cell, given its number and the number of all cells."""


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

    def simulate(self, trace: CellTrace, advance: Callable[[int], None] = lambda cells: None) -> Done:
        """Serve the requests of the cells to be simulated.

        Args:
            advance: called with 1 after each cell.
        """
        done = Done(self.frontends)
        for number in range(self.cells if self.cells is not None else self.frontends):
            requests = trace(number, self.frontends)
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
        )

    def _share(self, engines: int, number: int) -> int:
        """Return a cell's part of so many engines; the first cells have one more if they do not divide evenly."""
        return engines // self.frontends + (number < engines % self.frontends)


def split(trace: Sequence[TraceRequest]) -> CellTrace:
    """Return the traces of cells: all requests of a conversation come to one frontend, others to any."""

    def of_cell(number: int, cells: int) -> list[TraceRequest]:
        return [request for i, request in enumerate(trace) if _cell_of(request, i, cells) == number]

    return of_cell


def _cell_of(request: TraceRequest, index: int, cells: int) -> int:
    name = request.conversation if request.conversation is not None else f"request {index}"
    return zlib.crc32(name.encode()) % cells


def generated(conversations: Conversations) -> CellTrace:
    """Return traces that are generated for each cell, with an equal share of the requests and of their rate."""

    def of_cell(number: int, cells: int) -> list[TraceRequest]:
        rate = conversations.rate / cells if conversations.rate else None
        requests = max(1, conversations.requests // cells)
        share = replace(conversations, rate=rate, requests=requests, seed=conversations.seed + 1_000_003 * number)
        return share.trace()

    return of_cell


def generated_equal(rate: float | None, requests: int, input_len: int, output_len: int, seed: int) -> CellTrace:
    """Return traces of independent requests of equal lengths, likewise."""

    def of_cell(number: int, cells: int) -> list[TraceRequest]:
        share = rate / cells if rate else None
        return poisson_trace(share, max(1, requests // cells), input_len, output_len, seed + 1_000_003 * number)

    return of_cell
