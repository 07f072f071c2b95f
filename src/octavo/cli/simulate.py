"""octavo simulate: how the engine would serve a trace of requests, in virtual time, to plan capacity."""

import dataclasses
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from octavo.config import EngineConfig, parse_size
from octavo.errors import ConfigError

from .bench import InputLen, OutputJson, OutputLen, Seed
from .engine_flags import engine_flags

if TYPE_CHECKING:
    from octavo.simulation import CostModel
    from octavo.simulation.trace import TraceRequest


def register(app: typer.Typer) -> None:
    app.command()(engine_flags(simulate, model_argument=False))


def simulate(
    config: EngineConfig,
    trace: Annotated[
        Path | None, typer.Argument(help="Requests as JSON lines; one is made up by default.", show_default=False)
    ] = None,
    cost_model: Annotated[Path | None, typer.Option(help="What steps cost, as --measure wrote it.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load --model, time its steps and write the file --cost-model.")
    ] = False,
    rate: Annotated[
        str | None, typer.Option(help="Of a trace made up: new requests, such as 10000/min; all at once by default.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of a trace made up: how many.")] = 1000,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    seed: Seed = 0,
    write_trace: Annotated[Path | None, typer.Option(help="Write the trace made up to this file.")] = None,
    pages: Annotated[
        int | None, typer.Option(min=1, help="Pages of the KV cache; as many as were measured by default.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare, such as pages=500,1000 or scheduling_policy=fcfs,fair; again: every combination.",
            show_default=False,
        ),
    ] = None,
    output_json: OutputJson = None,
) -> None:
    """Replay arrivals through the real scheduler and page manager, with a cost model in place of the model.

    First --measure --cost-model FILE on the machine in question, then TRACE --cost-model FILE anywhere.
    """
    from octavo.bench.report import write_json
    from octavo.simulation import CostModel
    from octavo.simulation.report import print_report, print_sweep

    if measure:
        return _measure(config, _needed(cost_model))
    arrivals = _arrivals(trace, rate, requests, input_len, output_len, seed, write_trace)
    if write_trace and not cost_model:
        return
    costs = CostModel.load(_needed(cost_model))
    swept = [_split(one) for one in sweep or ()]
    rows = []
    for values in product(*(values for _, values in swept)):
        chosen = dict(zip((name for name, _ in swept), values, strict=True))
        rows.append((chosen, _simulate(arrivals, config, costs, pages, chosen)))
    settings = {"trace": str(trace) if trace else None, "rate": rate, "seed": seed, "cost_model": str(cost_model)}
    if sweep:
        print_sweep(rows)
        write_json("simulate", settings, {"runs": [chosen | summary for chosen, summary in rows]}, output_json)
    else:
        print_report(rows[0][1])
        write_json("simulate", settings, rows[0][1], output_json)


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
            raise ConfigError("--rate and --write-trace are for a trace that is made up: leave out the file, or them")
        return read_trace(trace)
    made_up = poisson_trace(parse_rate(rate) if rate else None, requests, input_len, output_len, seed)
    if write_to:
        write_trace(write_to, made_up)
    return made_up


def _check(config: EngineConfig, costs: "CostModel") -> None:
    """Refuse what the costs cannot tell."""
    defaults = EngineConfig()
    for name, measured in costs.settings.items():
        if (value := getattr(config, name, measured)) not in (getattr(defaults, name, None), measured):
            raise ConfigError(f"the cost model was measured with {name} {measured}: measure once more with {value}")
    if (config.kv_disk or config.kv_host_memory) and not costs.seconds_per_page:
        raise ConfigError("the cost model was measured with no tier below the pool: measure with --kv-disk FOLDER")
    if config.speculative_tokens:
        raise ConfigError("a simulation has no text whose next tokens could be guessed: leave out speculative_tokens")


def _simulate(
    arrivals: "Sequence[TraceRequest]",
    config: EngineConfig,
    costs: "CostModel",
    pages: int | None,
    chosen: dict[str, str],
) -> dict[str, Any]:
    """The summary of one simulation, with the settings `chosen` by a sweep; and of what the engine sustains.

    That is what it serves when all requests are there at once, and nobody is sent away.
    """
    from octavo.bench.report import progress
    from octavo.simulation.replay import simulate as run
    from octavo.simulation.report import summarize

    for name, value in chosen.items():
        if name == "pages":
            pages = _whole(value)
        else:
            config = config.replaced(name, value)
    _check(config, costs)
    if pages is None:
        memory = config.kv_cache_memory
        pages = costs.num_pages if memory is None else parse_size(memory, "kv_cache_memory") // costs.page_bytes
    at_once = [msgspec.structs.replace(request, at=0.0, timeout=None) for request in arrivals]
    patient = dataclasses.replace(config, max_queue=len(arrivals), request_timeout=None)
    with progress(" ".join(chosen.values()) or "Simulating", 2 * len(arrivals)) as advance:
        summary = summarize(run(arrivals, config, costs, pages, advance))
        saturated = summarize(run(at_once, patient, costs, pages, advance))
    return summary | {"sustained_per_second": saturated["requests_per_second"]}


def _split(sweep: str) -> tuple[str, list[str]]:
    name, _, values = sweep.partition("=")
    if not name or not all(values.split(",")):
        raise ConfigError(f"--sweep must be such as pages=500,1000, not {sweep!r}")
    return name.strip().replace("-", "_"), values.split(",")


def _whole(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"pages must be a whole number of at least 1, not {value!r}")
    return int(value)


def _needed(path: Path | None) -> Path:
    if path is None:
        raise ConfigError(
            "name the cost model: --cost-model FILE; octavo simulate --measure --cost-model FILE makes one"
        )
    return path
