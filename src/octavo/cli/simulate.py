"""octavo simulate: simulate how the engine serves a trace of requests, in virtual time, to plan capacity."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.settings import Resolved

from .bench import InputLen, OutputJson, OutputLen, Seed
from .flags import Command, settings_flags

FLEET_MINUTES = 10.0  # of the generated trace of a fleet
FLEET: dict[str, Any] = {"rich_help_panel": "Fleet", "show_default": False}


def register(app: typer.Typer) -> None:
    app.command(cls=Command)(settings_flags(EngineConfig, model_argument=False)(simulate))


def simulate(
    settings: Resolved,
    workload: Annotated[
        Path | None,
        typer.Argument(
            metavar="TRACE", help="Requests to replay, one JSON object per line; by default a generated trace."
        ),
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
    turns: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Generated trace: mean number of requests in a conversation; then lengths are random, with the means "
            "--input-len (of a user's text) and --output-len. By default, requests are independent and equal.",
            show_default=False,
        ),
    ] = None,
    think_time: Annotated[
        float, typer.Option(min=0, help="With --turns: mean seconds from an answer to the next request.")
    ] = 10.0,
    system_prompts: Annotated[int, typer.Option(min=1, help="With --turns: number of system prompts.")] = 8,
    system_len: Annotated[int, typer.Option(min=1, help="With --turns: tokens in each system prompt.")] = 512,
    skew: Annotated[
        float, typer.Option(min=0, help="With --turns: Zipf exponent of the system prompts' popularity.")
    ] = 1.0,
    seed: Seed = 0,
    write_trace: Annotated[Path | None, typer.Option(help="Write the generated trace to this file.")] = None,
    pages: Annotated[
        int | None, typer.Option(min=1, help="Pages of the KV cache; by default the number in the measured engine.")
    ] = None,
    routing: Annotated[
        str,
        typer.Option(
            help="With --data-parallel-size: how requests are distributed among replicas. Octavo does exact; "
            "round-robin and least-loaded are for comparison."
        ),
    ] = "exact",
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare values, such as pages=500,1000 or scheduling_policy=fcfs,fair or routing=exact,round-robin. "
            "May be given several times: every combination is simulated.",
            show_default=False,
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Generated trace: its length, in place of --requests. Default for fleets: 10.", **FLEET
        ),
    ] = None,
    engines: Annotated[
        int | None,
        typer.Option(min=1, help="Simulate a fleet of so many engines, with failures and autoscaling.", **FLEET),
    ] = None,
    frontends: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frontends, which share the engines evenly. Default: 1 per 50 engines; more if a plan needs them.",
            **FLEET,
        ),
    ] = None,
    cells: Annotated[
        int | None,
        typer.Option(
            min=1, help="Simulate only so many frontends with their engines; the others are taken to be alike.", **FLEET
        ),
    ] = None,
    ttft_ms: Annotated[
        float | None,
        typer.Option(
            "--ttft-ms",
            min=0.001,
            help="Goal: milliseconds to a request's first token. Without --engines, "
            "the fewest engines that meet the goals are searched for.",
            **FLEET,
        ),
    ] = None,
    tpot_ms: Annotated[
        float | None,
        typer.Option("--tpot-ms", min=0.001, help="Goal: milliseconds per further token of a request.", **FLEET),
    ] = None,
    percentile: Annotated[
        float,
        typer.Option(min=1, max=99.9, help="Goal: per cent of the requests that keep it.", rich_help_panel="Fleet"),
    ] = 95.0,
    price: Annotated[float | None, typer.Option(min=0, help="Price of an engine for an hour.", **FLEET)] = None,
    faults: Annotated[
        str | None,
        typer.Option(
            help="Rates of faults of an engine, such as kill=1/day,suspend=1/day,partition=2/day,slow=1/day.", **FLEET
        ),
    ] = None,
    start_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="Time until a new engine serves, after the loss of one or the decision to add one.",
            rich_help_panel="Fleet",
        ),
    ] = 60.0,
    max_engines: Annotated[
        int | None, typer.Option(min=1, help="Add engines while tokens are queued, up to so many.", **FLEET)
    ] = None,
    queued_tokens: Annotated[
        float,
        typer.Option(
            min=1, help="With --max-engines: tokens of queued prompts per engine to aim at.", rich_help_panel="Fleet"
        ),
    ] = 1000.0,
    output_json: OutputJson = None,
) -> None:
    """Replay a trace through the real scheduler and page pool, with a cost model in place of the model.

    First run --measure --cost-model FILE on the machine that will serve; then TRACE --cost-model FILE on any machine.
    With --engines or a goal, a whole fleet is simulated (docs/scale.md).
    """
    from octavo.bench.report import write_json
    from octavo.simulation import CostModel
    from octavo.simulation.conversations import Conversations
    from octavo.simulation.plan import parse_axis
    from octavo.simulation.plan import sweep as run
    from octavo.simulation.report import print_report, print_sweep
    from octavo.simulation.trace import poisson_trace, read_trace
    from octavo.simulation.trace import write_trace as save_trace

    from .simulate_fleet import FleetOptions, load_of, run_fleet

    workload = _workload(workload, settings)
    config = settings.build(EngineConfig)
    if measure:
        return _measure(config, _required(cost_model))
    if workload and (rate or write_trace or turns or minutes):
        raise ConfigError(
            "--rate, --minutes, --turns and --write-trace need a generated trace; leave out the trace file, "
            "or these flags"
        )
    is_fleet = engines is not None or ttft_ms is not None or tpot_ms is not None
    if is_fleet and rate and minutes is None:
        minutes = FLEET_MINUTES
    conversations = Conversations(
        requests=_requests(requests, rate, minutes),
        rate=_per_second(rate),
        turns=turns or 1.0,
        think_time=think_time,
        input_len=input_len,
        output_len=output_len,
        system_prompts=system_prompts,
        system_len=system_len,
        skew=skew,
        seed=seed,
    )
    options = FleetOptions(
        engines=engines, frontends=frontends, cells=cells, ttft_ms=ttft_ms, tpot_ms=tpot_ms, percentile=percentile,
        price=price, faults=faults, seed=seed, start_seconds=start_seconds, max_engines=max_engines,
        queued_tokens=queued_tokens, pages=pages, minutes=minutes,
    )  # fmt: skip
    if is_fleet:
        if sweep or write_trace or routing != "exact" or config.data_parallel_size > 1:
            raise ConfigError(
                "--sweep, --write-trace, --routing and --data-parallel-size do not go with a fleet: "
                "leave them out, or --engines and the goals"
            )
        costs = CostModel.load(_required(cost_model))
        longest = min(config.max_model_len or costs.max_model_len, costs.max_model_len) - 1
        load = load_of(workload, dataclasses.replace(conversations, max_len=longest), are_equal=turns is None)
        return run_fleet(load, config, costs, options, output_json)
    options.refuse()
    if workload:
        arrivals = read_trace(workload)
    elif turns:
        arrivals = conversations.trace()
    else:
        arrivals = poisson_trace(conversations.rate, conversations.requests, input_len, output_len, seed)
    if write_trace:
        save_trace(write_trace, arrivals)
    if write_trace and not cost_model:
        return
    costs = CostModel.load(_required(cost_model))
    runs = run(arrivals, config, costs, pages, [parse_axis(text) for text in sweep or ()], routing)
    given = {"trace": str(workload) if workload else None, "rate": rate, "seed": seed, "cost_model": str(cost_model)}
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


def _workload(argument: Path | None, settings: Resolved) -> Path | None:
    """Return the trace to replay, given as the argument or by --trace, which other commands write."""
    flag = settings.values.pop("trace", None)
    if argument is not None and flag is not None:
        raise ConfigError(f"two traces are given, {argument} and --trace {flag}; leave one out")
    return Path(flag) if flag is not None else argument


def _requests(requests: int, rate: str | None, minutes: float | None) -> int:
    if minutes is None:
        return requests
    if rate is None:
        raise ConfigError("--minutes needs --rate; without a rate, all --requests arrive at once")
    return max(1, round((_per_second(rate) or 0.0) * 60 * minutes))


def _per_second(rate: str | None) -> float | None:
    from octavo.simulation.trace import parse_rate

    return parse_rate(rate) if rate else None


def _required(path: Path | None) -> Path:
    if path is None:
        raise ConfigError("--cost-model FILE is missing; octavo simulate --measure --cost-model FILE writes one")
    return path
