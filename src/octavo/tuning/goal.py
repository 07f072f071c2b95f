"""Load and Goal: what a server has to serve, and how fast."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from octavo.simulation.replay import Served
from octavo.simulation.trace import TraceRequest, poisson_trace

MOST_TOKENS = 15_000  # generated in a simulation, which takes a second or two
FEWEST_REQUESTS, MOST_REQUESTS = 60, 300


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests of equal lengths, whose prompts share nothing. Either `rate` or `streams` is None.

    Attributes:
        rate: Arrivals per second, at random (a Poisson process).
        streams: Clients that each send their next request as soon as the answer before it is complete.
        input_len, output_len: Tokens of each prompt, and of each answer.
    """

    rate: float | None = None
    streams: int | None = None
    input_len: int
    output_len: int

    @property
    def amount(self) -> float:
        """Return the requests per second, or the streams."""
        return self.streams or self.rate or 0.0

    @property
    def amount_text(self) -> str:
        """Return the amount in words: a rate below one per second is given per minute."""
        if self.streams:
            return f"{self.streams} {'stream' if self.streams == 1 else 'streams'}"
        return f"{self.amount:.3g} requests/s" if self.amount >= 1 else f"{60 * self.amount:.3g} requests/min"

    def of(self, amount: float) -> "Load":
        """Return such a load of another amount; streams are rounded down, to at least one."""
        return replace(self, streams=max(1, int(amount))) if self.streams else replace(self, rate=amount)

    def __str__(self) -> str:
        return f"{self.amount_text}, prompts of {self.input_len:,} tokens, answers of {self.output_len:,}"

    def trace(self, step_seconds: float) -> list[TraceRequest]:
        """Return requests for a simulation.

        Args:
            step_seconds: About the time of a token; streams begin one after another within the time of an answer.
        """
        requests = min(MOST_REQUESTS, max(FEWEST_REQUESTS, MOST_TOKENS // self.output_len))
        if self.streams is None:
            return poisson_trace(self.rate, requests, self.input_len, self.output_len, seed=0)
        apart = self.output_len * step_seconds / self.streams
        return [
            TraceRequest(
                at=apart * (number % self.streams),
                prompt_tokens=self.input_len,
                output_tokens=self.output_len,
                conversation=str(number % self.streams),
                think_time=0.0,
            )
            for number in range(max(requests, 3 * self.streams))
        ]


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds that a percentile of the requests does not exceed.

    Attributes:
        first: From a request's arrival to its first token.
        per_token: Between its tokens, in the mean of a request; None if answers have a single token.
        whole: From its arrival to its last token.
    """

    first: float
    per_token: float | None
    whole: float


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The times that a percentile of the requests must not exceed, in milliseconds; None: any."""

    first: float | None = None
    per_token: float | None = None
    percentile: float = 95.0

    def __str__(self) -> str:
        parts = [
            f"{name} within {limit:g} ms"
            for name, limit in (("first token", self.first), ("time per token", self.per_token))
            if limit is not None
        ]
        return (
            f"{' and '.join(parts)} for {self.percentile:g} % of the requests"
            if parts
            else "the shortest requests (no limit is set)"
        )

    @property
    def is_set(self) -> bool:
        return self.first is not None or self.per_token is not None

    def times(self, served: Sequence[Served]) -> Times | None:
        """Return the times of the requests that got all their tokens; None if none did."""
        done = [each for each in served if not each.problem and each.first is not None]
        if not done:
            return None
        several = [each for each in done if each.output_tokens > 1]
        return Times(
            first=self._percentile([each.first - each.arrival for each in done if each.first is not None]),
            per_token=self._percentile(
                [(each.last - each.first) / (each.output_tokens - 1) for each in several if each.first is not None]
            )
            if several
            else None,
            whole=self._percentile([each.last - each.arrival for each in done]),
        )

    def share(self, times: Times) -> float:
        """Return the largest share of a limit that is used: at most 1 if the goal is met.

        Without limits, return the milliseconds of a whole request, so that less is better, too.
        """
        shares = [
            used / limit
            for used, limit in ((times.first, self.first), (times.per_token, self.per_token))
            if limit is not None and used is not None
        ]
        return max(shares, default=0.0) if self.is_set else times.whole

    def _percentile(self, seconds: list[float]) -> float:
        return 1000 * float(np.percentile(seconds, self.percentile))
