"""Load: the requests that come to a fleet, divided among its frontends."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from octavo.simulation.conversations import Conversations
from octavo.simulation.trace import TraceRequest, poisson_trace

_APART = 1_000_003  # between the seeds of cells


class Load(Protocol):
    """The requests that come to all frontends.

    Attributes:
        requests: their number.
        rate: arrivals per second; None if all come at once.
    """

    @property
    def requests(self) -> int: ...

    @property
    def rate(self) -> float | None: ...

    def cell(self, number: int, cells: int) -> list[TraceRequest]:
        """Return the requests of frontend `number` of `cells`, from 0."""
        ...


@dataclass(frozen=True)
class RecordedLoad:
    """A trace. All requests of a conversation come to one frontend, the others to any."""

    trace: Sequence[TraceRequest]

    @property
    def requests(self) -> int:
        return len(self.trace)

    @property
    def rate(self) -> float | None:
        times = [request.at for request in self.trace]
        span = max(times) - min(times)
        return len(times) / span if span else None

    def cell(self, number: int, cells: int) -> list[TraceRequest]:
        """See Load."""
        return [request for i, request in enumerate(self.trace) if _cell_of(request, i, cells) == number]


@dataclass(frozen=True)
class GeneratedLoad:
    """A generated trace, of which each frontend has an equal part of its own.

    Attributes:
        are_equal: whether the requests are independent and of equal lengths.
    """

    conversations: Conversations
    are_equal: bool = False

    @property
    def requests(self) -> int:
        return self.conversations.requests

    @property
    def rate(self) -> float | None:
        return self.conversations.rate

    def cell(self, number: int, cells: int) -> list[TraceRequest]:
        """See Load."""
        whole = self.conversations
        part = replace(
            whole,
            rate=whole.rate / cells if whole.rate else None,
            requests=max(1, whole.requests // cells),
            seed=whole.seed + _APART * number,
        )
        if self.are_equal:
            return poisson_trace(part.rate, part.requests, part.input_len, part.output_len, part.seed)
        return part.trace()


def _cell_of(request: TraceRequest, index: int, cells: int) -> int:
    name = request.conversation if request.conversation is not None else f"request {index}"
    return zlib.crc32(name.encode()) % cells
