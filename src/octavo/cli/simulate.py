"""octavo simulate: simulate how the engine serves a trace of requests, in virtual time, to plan capacity."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.settings import Resolved

from .bench import InputLen, OutputJson, OutputLen, Seed
from .flags import Command, settings_flags

if TYPE_CHECKING:
    from octavo.simulation.trace import TraceRequest


def register(app: typer.Typer) -> None:
    app.command(cls=Command)(settings_flags(EngineConfig, model_argument=False)(simulate))


def simulate(
    settings: Resolved,
    trace: Annotated[
        Path | None,
        typer.Argument(help="Requests to replay, one JSON object per line; by default a generated trace."),
    ] = None,
    cost_model: Annotated[Path | None, typer.Option(help="Cost model file, written by --measure.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load --model, time its steps, and write the --cost-model file.")
    ] = False,
    rate: Annotated[
        str | None,
        typer.Option(help="Generated trace: arrival rate, such as 10000/min or 20/s; by default all at once."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Generated trace: number of requests.")] = 1000,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    seed: Seed = 0,
    write_trace: Annotated[Path | None, typer.Option(help="Write the generated trace to this file.")] = None,
    pages: Annotated[
        int | None, typer.Option(min=1, help="Pages of the KV cache; by default the number in the measured engine.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare values, such as pages=500,1000 or scheduling_policy=fcfs,fair. May be given several times: "
            "every combination is simulated.",
            show_default=False,
        ),
    ] = None,
    output_json: OutputJson = None,
) -> None:
    """Replay a trace through the real scheduler and page pool, with a cost model in place of the model.

    First run --measure --cost-model FILE on the machine that will serve; then TRACE --cost-model FILE on any machine.
    """
    from octavo.bench.report import write_json
    from octavo.simulation import CostModel
    from octavo.simulation.plan import parse_axis
    from octavo.simulation.plan import sweep as run
    from octavo.simulation.report import print_report, print_sweep

    config = settings.build(EngineConfig)
    if measure:
        return _measure(config, _required(cost_model))
    arrivals = _arrivals(trace, rate, requests, input_len, output_len, seed, write_trace)
    if write_trace and not cost_model:
        return
    costs = CostModel.load(_required(cost_model))
    runs = run(arrivals, config, costs, pages, [parse_axis(text) for text in sweep or ()])
    given = {"trace": str(trace) if trace else None, "rate": rate, "seed": seed, "cost_model": str(cost_model)}
    if sweep:
        print_sweep(runs)
        write_json("simulate", given, {"runs": [chosen | summary for chosen, summary in runs]}, output_json)
    else:
        print_report(runs[0][1])
        write_json("simulate", given, runs[0][1], output_json)


def _measure(config: EngineConfig, path: Path) -> None:
    from octavo.engine.loading import load_engine
    from octavo.frontend.progress import loading_bar
    from octavo.simulation.measure import measure
    from octavo.simulation.report import print_costs
    from octavo.weights import resolve

    if not path.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no such folder")
    with loading_bar() as loaded:
        engine = load_engine(config, resolve(config.model, config.revision), loaded)
    try:
        costs, ratios = measure(engine, config)
    finally:
        engine.close()
    costs.save(path)
    print_costs(costs, ratios)


def _arrivals(
    trace: Path | None,
    rate: str | None,
    requests: int,
    input_len: int,
    output_len: int,
    seed: int,
    write_to: Path | None,
) -> "Sequence[TraceRequest]":
    from octavo.simulation.trace import parse_rate, poisson_trace, read_trace, write_trace

    if trace:
        if rate or write_to:
            raise ConfigError(
                "--rate and --write-trace need a generated trace; leave out the trace file, or these flags"
            )
        return read_trace(trace)
    generated = poisson_trace(parse_rate(rate) if rate else None, requests, input_len, output_len, seed)
    if write_to:
        write_trace(write_to, generated)
    return generated


def _required(path: Path | None) -> Path:
    if path is None:
        raise ConfigError("--cost-model FILE is missing; octavo simulate --measure --cost-model FILE writes one")
    return path
