"""Plan: the fewest engines that serve a load within a goal, and what an engine sustains."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from octavo.config import EngineConfig
from octavo.simulation.costs import CostModel

from .cell import Cell
from .fleet import Fleet
from .frontend_costs import frontend_use
from .load import Load
from .record import Done

ENGINES_PER_FRONTEND = 50  # at most, of a plan that leaves the number of frontends open
FRONTEND_USE = 0.7  # at most, of such a plan's frontends
PROBE = 1000  # requests at once, to find what an engine sustains
PRECISION = 0.02  # relative, of the number of engines
MARGIN = 1.1  # the first try: engines beyond those that the load needs if all are always busy
GROWTH = 1.4  # of the number of engines from try to try, until one meets the goal
MOST_TRIES = 20


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Limits that a percentage of the requests must keep: of the time to the first token, and of that per token.

    Attributes:
        first, per_token: milliseconds; None for no limit.
    """

    first: float | None
    per_token: float | None
    percentile: float = 95.0

    def share(self, done: Done) -> float:
        """Return the share of the requests that keep the limits. Those that failed do not."""
        done = done.steady()
        kept = np.ones(len(done.arrival), bool)
        if self.first is not None:
            kept &= 1000 * done.time_to_first_token <= self.first
        if self.per_token is not None:
            several = done.output > 1
            kept[several] &= 1000 * done.time_per_token <= self.per_token
        return float(kept.sum()) / max(1, len(kept) + sum(done.problems.values()))

    def is_met(self, done: Done) -> bool:
        """Return whether enough requests keep the limits."""
        return 100 * self.share(done) >= self.percentile

    def __str__(self) -> str:
        limits = [
            text.format(limit)
            for text, limit in (
                ("first token within {:,g} ms", self.first),
                ("time per token within {:,g} ms", self.per_token),
            )
            if limit is not None
        ]
        return f"{' and '.join(limits)} for {self.percentile:g} % of the requests"


@dataclass(frozen=True)
class Trial:
    """A simulated number of engines."""

    fleet: Fleet
    done: Done
    is_met: bool


def fewest_engines(
    fleet: Fleet,
    frontends: int | None,
    cells: int | None,
    load: Load,
    goal: Goal,
    at_least: int,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Search for the fewest engines that meet a goal; see `best`. Return all trials.

    Args:
        fleet: a fleet of any number of engines.
        frontends: their number; None for as many as ENGINES_PER_FRONTEND and FRONTEND_USE ask for.
        cells: at most how many of them to simulate; None for all.
        at_least: the least number of engines to try.
    """
    trials: list[Trial] = []
    each = float(ENGINES_PER_FRONTEND)  # engines per frontend

    def meets(engines: int) -> bool:
        nonlocal each
        while True:
            count = frontends or math.ceil(engines / each)
            tried = replace(fleet, engines=engines, frontends=count, cells=min(count, cells) if cells else None)
            done = tried.simulate(load)
            use = frontend_use(done)
            if frontends or use <= FRONTEND_USE or count >= engines:
                break
            each = max(1.0, engines / count * 0.95 * FRONTEND_USE / use)
        trials.append(Trial(tried, done, goal.is_met(done)))
        on_trial(trials[-1])
        return trials[-1].is_met

    too_few, enough = max(1, at_least, frontends or 1) - 1, max(1, math.ceil(MARGIN * at_least), frontends or 1)
    while not meets(enough):
        too_few, enough = enough, math.ceil(GROWTH * enough)
        if len(trials) >= MOST_TRIES:
            return trials
    while enough - too_few > max(1, math.floor(PRECISION * enough)):
        middle = (too_few + enough) // 2
        if meets(middle):
            enough = middle
        else:
            too_few = middle
    return trials


def best(trials: list[Trial]) -> Trial:
    """Return the trial with the fewest engines that meet the goal; without one, the last trial."""
    return min((trial for trial in trials if trial.is_met), key=lambda trial: trial.fleet.engines, default=trials[-1])


def sustained(load: Load, config: EngineConfig, costs: CostModel, pages: int) -> float:
    """Return the requests per second of an engine to which some of a load's requests come all at once."""
    trace = load.cell(0, max(1, load.requests // PROBE))
    at_once = [
        msgspec.structs.replace(request, at=0.0, timeout=None, think_time=None if request.think_time is None else 0.0)
        for request in trace
    ]
    patient = replace(config, max_queue=len(at_once), request_timeout=None)
    requests, _ = Cell(at_once, patient, costs, pages, engines=1).run()
    ends = np.sort(np.array(requests.last))
    first, last = len(ends) // 10, max(len(ends) // 10 + 1, len(ends) * 9 // 10)  # without beginning and end
    if len(ends) < 20:
        return len(ends) / float(ends[-1])
    return (last - first) / float(ends[last - 1] - ends[first - 1] if first else ends[last - 1])
