"""octavo tune: measure the machine with a model, and propose settings for a load and a goal."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.config import QUANTIZATIONS, EngineConfig
from octavo.errors import ConfigError
from octavo.settings import Resolved

from .bench import InputLen, OutputLen
from .flags import Command, settings_flags

if TYPE_CHECKING:
    from octavo.simulation import CostModel
    from octavo.tuning.goal import Goal, Load
    from octavo.tuning.trial import Trial

STREAMS = 8  # of the load, if none is given


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(cls=Command)(tune)


@settings_flags(EngineConfig)
def tune(
    settings: Resolved,
    rate: Annotated[
        str | None, typer.Option(help="Load: requests that arrive, such as 2/s or 300/min.", show_default=False)
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Load: clients that each send one request after another. Default: 8.",
            show_default=False,
        ),
    ] = None,
    input_len: InputLen = 512,
    output_len: OutputLen = 128,
    ttft_ms: Annotated[
        float | None,
        typer.Option("--ttft-ms", min=0.001, help="Goal: milliseconds to a request's first token.", show_default=False),
    ] = None,
    tpot_ms: Annotated[
        float | None,
        typer.Option(
            "--tpot-ms", min=0.001, help="Goal: milliseconds per further token of a request.", show_default=False
        ),
    ] = None,
    percentile: Annotated[
        float, typer.Option(min=1, max=99, help="Goal: per cent of the requests for which it must hold.")
    ] = 95.0,
    allow_quantization: Annotated[
        bool,
        typer.Option("--allow-quantization", help="Also try 8bit and 4bit weights, which change the answers."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the settings to this file, for octavo serve --config FILE."),
    ] = None,
) -> None:
    """Measure this machine with a model, and propose the settings that serve a load within a goal.

    A few steps of the model are timed (a minute or two, on an otherwise idle machine); the rest is simulated. Settings
    that are given as flags or in --config stay as they are. Exits with code 1 if the goal cannot be met.
    """
    from octavo.simulation.trace import parse_rate
    from octavo.tuning.goal import Goal, Load
    from octavo.tuning.report import write_settings

    if rate is not None and streams is not None:
        raise ConfigError("--rate and --streams are two kinds of load: leave one out")
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {output}: there is no such folder")
    config = settings.build(EngineConfig)
    if config.data_parallel_size > 1:
        raise ConfigError("tune finds the settings of one engine: leave out data_parallel_size, and give its load")
    if config.tensor_parallel_size > 1:
        raise ConfigError("tune finds the settings of one process: leave out tensor_parallel_size")
    load = Load(
        rate=parse_rate(rate) if rate is not None else None,
        streams=None if rate is not None else streams or STREAMS,
        input_len=input_len,
        output_len=output_len,
    )
    goal = Goal(first=ttft_ms, per_token=tpot_ms, percentile=percentile)
    given = {
        name: value for name, value in settings.values.items() if not settings.origins[name].startswith("environment")
    }
    text, is_met = _tune(config, load, goal, set(settings.values), given, allow_quantization)
    if output is not None:
        write_settings(output, text, given)
        typer.echo(f"\nWritten: {output}. Start the server: octavo serve --config {output}")
    if not is_met:
        raise typer.Exit(1)


def _tune(
    config: EngineConfig, load: "Load", goal: "Goal", fixed: set[str], given: dict[str, object], may_quantize: bool
) -> tuple[str, bool]:
    """Measure, simulate and print. Return the text of a file of settings, and whether the goal is met."""
    from octavo.bench.report import progress
    from octavo.tuning import report
    from octavo.tuning.disturbance import watched
    from octavo.tuning.measuring import check_length, screen
    from octavo.tuning.search import best_of, chosen, max_batch_tokens, propose
    from octavo.weights import resolve

    path = resolve(config.model, config.revision)
    check_length(config, path, load)
    typer.echo(f"Load: {load}\nGoal: {goal}")
    largest = dataclasses.replace(config, max_batch_tokens=max_batch_tokens(fixed, config))
    costs: dict[str, CostModel] = {}
    tried: dict[str, list[Trial]] = {}
    with watched() as disturbance:
        fastest, screened = screen(largest, path, load, fixed, report.print_screened)
        for name in _quantizations(config, fixed, may_quantize):
            candidate = dataclasses.replace(fastest, quantization=name)
            typer.echo(f"Measuring and simulating with {name} as quantization")
            costs[name], tried[name] = _simulate(candidate, path, load, goal, fixed)
            if goal.is_set and best_of(tried[name]).share <= 1:
                break  # further ones would only change more
    report.print_disturbance(disturbance)
    with progress("Comparing under more load", 1):
        best = chosen(tried, costs, goal)
    every = [trial for trials in tried.values() for trial in trials]
    report.print_trials(every, best, goal)
    model = costs[best.config.quantization]
    with progress("Simulating more and less load", 12) as advance:
        proposal = propose(best, model, goal, fixed, lambda: advance(1))
    why = report.reasons(proposal, screened, every, fixed, may_quantize)
    lines = report.conclusion(proposal, goal, may_quantize or "quantization" in fixed)
    report.print_proposal(proposal.trial.config, why, [*lines, report.SCOPE])
    head = [*report.head_lines(config, load, goal, model.machine), *lines]
    return report.settings_file(proposal.trial.config, given, why, head), proposal.meets


def _simulate(
    config: EngineConfig, path: Path, load: "Load", goal: "Goal", fixed: set[str]
) -> tuple["CostModel", "list[Trial]"]:
    from octavo.bench.report import progress
    from octavo.tuning.measuring import costs_of
    from octavo.tuning.search import trials

    costs = costs_of(config, path)
    tried = []
    with progress("Simulating", 7) as advance:
        for trial in trials(config, costs, load, goal, fixed):
            tried.append(trial)
            advance(1)
    return costs, tried


def _quantizations(config: EngineConfig, fixed: set[str], may_quantize: bool) -> list[str]:
    """Return the formats of weights to try, the most exact first."""
    if "quantization" in fixed or not may_quantize or config.backend_name != "cpu":
        return [config.quantization]
    return [name for name in QUANTIZATIONS if name != "auto"]
