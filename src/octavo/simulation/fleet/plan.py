"""Plan: the fewest engines that serve a load within a goal, and what an engine could serve."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from octavo.simulation.costs import Shape

from .fleet import Fleet
from .frontend_costs import frontend_use
from .load import Load, RecordedLoad
from .record import Done

ENGINES_PER_FRONTEND = 50  # at most, of a plan that leaves the number of frontends open
FRONTEND_USE = 0.7  # at most, of such a plan's frontends
PROBE = 1000  # requests of a single engine, for a first guess
PRECISION = 0.02  # relative, of the number of engines
MARGIN = 1.2  # the first try: engines beyond those that the load needs if all are always busy
GROWTH = 1.4  # of the number of engines from try to try, until one meets the goal and another one does not
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
    about: int,
    each: float = ENGINES_PER_FRONTEND,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Search for the fewest engines that meet a goal; see `best`. Return all trials.

    Args:
        fleet: a fleet of any number of engines.
        frontends: their number; None for as many as ENGINES_PER_FRONTEND and FRONTEND_USE ask for.
        cells: at most how many of them to simulate; None for all.
        about, each: the numbers of engines, and of engines per frontend, to begin with; see `guess`.
    """
    trials: list[Trial] = []

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

    least = max(1, frontends or 1)
    enough = max(least, math.ceil(MARGIN * about))
    if meets(enough):
        too_few = least - 1
        while (fewer := max(least, math.floor(enough / GROWTH))) < enough:
            if not meets(fewer):
                too_few = fewer
                break
            enough = fewer
    else:
        too_few, enough = enough, math.ceil(GROWTH * enough)
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


def guess(fleet: Fleet, load: Load) -> tuple[int, float]:
    """Return about the number of engines that a load needs, and how many of them a frontend can have.

    Both come from a part of the load on a single engine.
    """
    alone = replace(fleet, engines=1, frontends=1, cells=None, faults=None, scaling=None, until=None)
    done = alone.simulate(RecordedLoad(load.cell(0, max(1, load.requests // PROBE))))
    per_engine, use = capacity(done, alone), frontend_use(done)
    each = min(ENGINES_PER_FRONTEND, max(1.0, FRONTEND_USE / use)) if use else ENGINES_PER_FRONTEND
    return (max(1, math.ceil((load.rate or 0.0) / per_engine)) if per_engine else 1), each


def capacity(done: Done, fleet: Fleet) -> float:
    """Return the requests per second that an engine could serve if its batch were always full; 0 if none was served.

        time of a request = tokens to compute * time per row of a full prompt step + output tokens * step(n) / n

    with the mean lengths and the hit rate of the requests of `done`, and n sequences as far as slots and pages allow.
    """
    steady, config, costs = done.steady(), fleet.config, fleet.costs
    if not len(steady.arrival):
        return 0.0
    prompt, output, new = (float(each.mean()) for each in (steady.prompt, steady.output, steady.prompt - steady.cached))
    count = max(1, int(min(config.max_batch_size, fleet.pages * costs.page_size / (prompt + output))))
    seen = round(count * (prompt + output / 2))
    rows = config.max_batch_tokens
    step = costs.seconds(Shape(count, count, count, seen, seen))
    chunk = costs.seconds(Shape(1, rows, 0, round(prompt), round(rows * (prompt - new / 2))))
    return 1 / (new * chunk / rows + output * step / count)
