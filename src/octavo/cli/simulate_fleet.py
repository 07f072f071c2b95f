"""The part of octavo simulate that simulates a fleet: many engines behind frontends, or the fewest for a goal."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from octavo.config import EngineConfig
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.simulation import CostModel
    from octavo.simulation.conversations import Conversations
    from octavo.simulation.fleet.fleet import Fleet
    from octavo.simulation.fleet.load import Load
    from octavo.simulation.fleet.plan import Goal, Trial


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """The flags of a fleet; see octavo simulate --help."""

    engines: int | None
    frontends: int | None
    cells: int | None
    ttft_ms: float | None
    tpot_ms: float | None
    percentile: float
    price: float | None
    faults: str | None
    seed: int
    start_seconds: float
    max_engines: int | None
    queued_tokens: float
    pages: int | None
    minutes: float | None

    def refuse(self) -> None:
        """Raise ConfigError if an option is given that only a fleet has."""
        for name in ("frontends", "cells", "price", "faults", "max_engines"):
            if getattr(self, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} needs a fleet: give --engines, or a goal such as --ttft-ms 500")


def load_of(workload: Path | None, conversations: "Conversations", are_equal: bool) -> "Load":
    """Return the requests of a file, or generated ones. Raises ConfigError."""
    from octavo.simulation.fleet.load import GeneratedLoad, RecordedLoad
    from octavo.simulation.trace import read_trace

    return RecordedLoad(read_trace(workload)) if workload else GeneratedLoad(conversations, are_equal)


def run_fleet(
    load: "Load", config: EngineConfig, costs: "CostModel", options: FleetOptions, output_json: Path | None
) -> None:
    """Simulate a fleet, or search for the fewest engines that meet a goal, and print the result.

    Exits with 1 if a goal is not met. Raises ConfigError.
    """
    from octavo.bench.report import progress, write_json
    from octavo.simulation.fleet.plan import Goal, best
    from octavo.simulation.fleet.report import print_report, summarize
    from octavo.simulation.plan import check, num_pages

    check(config, costs)
    pages = num_pages(config, costs, options.pages)
    goal = None
    if options.ttft_ms is not None or options.tpot_ms is not None:
        goal = Goal(first=options.ttft_ms, per_token=options.tpot_ms, percentile=options.percentile)
    fleet = _fleet(config, costs, pages, options)
    if options.engines is None:
        assert goal is not None
        trial = best(_search(fleet, options, load, goal))
        done, fleet, is_met = trial.done, trial.fleet, trial.is_met
    else:
        cells = fleet.cells or fleet.frontends
        with progress("Simulating frontends", cells) as advance:
            done = fleet.simulate(load, advance)
        is_met = goal is None or goal.is_met(done)
    summary = summarize(done, fleet, options.price)
    print_report(summary)
    if goal is not None:
        share = goal.share(done)
        summary |= {"goal": str(goal), "goal_met": is_met, "goal_share": share}
        verdict = "meet" if is_met else "do not meet"
        typer.echo(f"{fleet.engines:,} engines {verdict} the goal: {goal} ({share:.1%} do).")
    given: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(options)}
    write_json("simulate", given, summary, output_json)
    if not is_met:
        raise typer.Exit(1)


def _fleet(config: EngineConfig, costs: "CostModel", pages: int, options: FleetOptions) -> "Fleet":
    from octavo.simulation.fleet.faults import parse_faults
    from octavo.simulation.fleet.fleet import Fleet, Scaling
    from octavo.simulation.fleet.plan import ENGINES_PER_FRONTEND

    engines = options.engines or options.frontends or 1
    is_plan = options.engines is None
    if is_plan and options.max_engines is not None:
        raise ConfigError("--max-engines needs --engines: a goal alone asks for a fixed number of engines")
    scaling = Scaling(most=options.max_engines, target=options.queued_tokens) if options.max_engines else None
    return Fleet(
        config=config,
        costs=costs,
        pages=pages,
        engines=engines,
        frontends=options.frontends or -(-engines // ENGINES_PER_FRONTEND),
        cells=None if is_plan else options.cells,
        start_seconds=options.start_seconds,
        faults=parse_faults(options.faults, options.seed) if options.faults else None,
        scaling=scaling,
        until=60 * options.minutes if options.minutes else None,
    )


def _search(fleet: "Fleet", options: FleetOptions, load: "Load", goal: "Goal") -> "list[Trial]":
    """Search for the fewest engines, and print each try. With faults, search without them first."""
    from octavo.simulation.fleet.plan import best, fewest_engines, guess

    def show(trial: "Trial") -> None:
        verdict = "meet" if trial.is_met else "do not meet"
        typer.echo(f"{trial.fleet.engines:,} engines {verdict} the goal ({goal.share(trial.done):.1%} of requests do)")

    about, each = guess(fleet, load)
    if fleet.faults is None:
        return fewest_engines(fleet, options.frontends, options.cells, load, goal, about, each, show)
    typer.echo("Without faults:")
    without = fewest_engines(
        replace(fleet, faults=None), options.frontends, options.cells, load, goal, about, each, show
    )
    enough = best(without).fleet.engines
    typer.echo(f"With faults ({options.faults}):")
    trials = fewest_engines(fleet, options.frontends, options.cells, load, goal, enough, each, show)
    if best(trials).is_met:
        spare = best(trials).fleet.engines - enough
        typer.echo(f"Spare engines for these faults: {spare:,} beside {enough:,}")
    return trials
