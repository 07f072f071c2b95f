"""Record: what happened to each request of a cell, and what its engines did."""

from array import array
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from octavo.simulation.trace import TraceRequest

UNKNOWN = float("nan")


@dataclass(eq=False)
class Requests:
    """The requests of a trace by their index in it. Times are in seconds from the start.

    Attributes:
        arrival, first, last: times of arrival, of the first and of the last token; NaN before they are known.
        prompt, output, cached: tokens of the prompt, of the output, and of the prompt that were found in a cache.
        ends: how often each request has ended: once if it has arrived.
        problems: the reason of each request that did not get all its tokens.
    """

    size: int
    arrival: "array[float]" = field(init=False)
    first: "array[float]" = field(init=False)
    last: "array[float]" = field(init=False)
    prompt: "array[int]" = field(init=False)
    output: "array[int]" = field(init=False)
    cached: "array[int]" = field(init=False)
    ends: bytearray = field(init=False)
    problems: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("arrival", "first", "last"):
            setattr(self, name, array("d", [UNKNOWN]) * self.size)
        for name in ("prompt", "output", "cached"):
            setattr(self, name, array("l", [0]) * self.size)
        self.ends = bytearray(self.size)

    def arrived(self, index: int, request: TraceRequest, prompt_tokens: int, now: float) -> None:
        """Note the arrival of a request."""
        self.arrival[index] = now
        self.prompt[index], self.output[index] = prompt_tokens, request.output_tokens

    def started(self, index: int, cached: int, now: float) -> None:
        """Note a token of a request; only the first one counts."""
        if self.first[index] != self.first[index]:
            self.first[index], self.cached[index] = now, cached

    def ended(self, index: int, now: float, problem: str | None = None) -> None:
        """Note the end of a request."""
        self.ends[index] += 1
        self.last[index] = now
        if problem is not None:
            self.problems[index] = problem


@dataclass
class Use:
    """What the engines and the frontend of a cell did. Sums of cells are sums of their fields, but for `peak_...`.

    Attributes:
        frontends, engines: that began.
        seconds: virtual time, times the number of frontends.
        engine_seconds: time of all engines, from when they were started.
        busy_seconds: in which a step was running.
        page_seconds, running_seconds, waiting_seconds: number of pages in use, and of running and waiting sequences,
            multiplied by the time of all steps.
        steps: of all engines; each sends one message with tokens.
        page_changes: pages that engines have gained or lost.
        moves: requests that were moved from an engine with a queue to one without.
        resumed: times that a request went on elsewhere because its engine was lost or drained.
        late: answers of engines to requests that had gone on elsewhere, which were dropped.
        faults: by kind.
        most_engines: highest number of engines at a time.
    """

    frontends: int = 0
    engines: int = 0
    seconds: float = 0.0
    engine_seconds: float = 0.0
    busy_seconds: float = 0.0
    page_seconds: float = 0.0
    running_seconds: float = 0.0
    waiting_seconds: float = 0.0
    peak_pages: int = 0
    peak_running: int = 0
    peak_waiting: int = 0
    num_pages: int = 0
    max_running: int = 0
    steps: int = 0
    tokens_computed: int = 0
    page_changes: int = 0
    preemptions: int = 0
    moves: int = 0
    resumed: int = 0
    late: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    scale_outs: int = 0
    scale_ins: int = 0
    most_engines: int = 0

    def add(self, other: "Use") -> None:
        """Add the use of another cell."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if name.startswith("peak_") or name in ("num_pages", "max_running"):
                setattr(self, name, max(mine, value))
            else:
                setattr(self, name, mine + value)


@dataclass
class Done:
    """The result of a simulated fleet: the figures of each request of the cells that were simulated.

    Shapes:
        arrival, first, last: float64 [N]. prompt, output, cached: int64 [N].

    Attributes:
        cells: number of cells of the fleet, of which use.frontends were simulated.
        begin, end: the time of arrival of the requests that count in latencies and rates; before it, caches are empty.
        problems: number of requests by the reason why they did not get all their tokens; these are not in the arrays.
    """

    cells: int
    begin: float = 0.0
    end: float | None = None
    use: Use = field(default_factory=Use)
    arrival: np.ndarray = field(default_factory=lambda: np.zeros(0))
    first: np.ndarray = field(default_factory=lambda: np.zeros(0))
    last: np.ndarray = field(default_factory=lambda: np.zeros(0))
    prompt: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    output: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    cached: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    problems: Counter[str] = field(default_factory=Counter)

    def add(self, requests: Requests, use: Use) -> None:
        """Add the result of a cell. Every request that has arrived must have ended once."""
        ends, arrived = np.frombuffer(requests.ends, np.uint8), ~np.isnan(np.array(requests.arrival))
        assert (ends == arrived).all(), f"{(ends != arrived).sum()} requests were lost or ended twice"
        good = arrived.copy()
        good[[*requests.problems]] = False
        for name in ("arrival", "first", "last", "prompt", "output", "cached"):
            setattr(self, name, np.concatenate([getattr(self, name), np.array(getattr(requests, name))[good]]))
        self.problems.update(requests.problems.values())
        self.use.add(use)

    def steady(self) -> "Done":
        """Return the requests that arrived at `begin` or later, with the use and the problems of all."""
        late = self.arrival >= self.begin
        kept = {name: getattr(self, name)[late] for name in ("arrival", "first", "last", "prompt", "output", "cached")}
        return replace(self, **kept)

    @property
    def rate(self) -> float:
        """Return the completed requests per second to the frontends that were simulated."""
        end = self.end if self.end is not None else self.use.seconds / max(1, self.use.frontends)
        return float((self.arrival >= self.begin).sum()) / (end - self.begin) if end > self.begin else 0.0

    @property
    def time_to_first_token(self) -> np.ndarray:
        """Return the seconds from arrival to the first token of each request: float64 [N]."""
        times: np.ndarray = self.first - self.arrival
        return times

    @property
    def time_per_token(self) -> np.ndarray:
        """Return the mean seconds per further token of each request with more than one: float64 [<= N]."""
        several = self.output > 1
        times: np.ndarray = (self.last - self.first)[several] / (self.output[several] - 1)
        return times
