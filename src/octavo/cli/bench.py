"""octavo bench: measure the engine (throughput, latency, roofline) or any OpenAI-compatible server (serve)."""

import dataclasses
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.config import EngineConfig
from octavo.terminal import printable

from .flags import Command, engine_flags

if TYPE_CHECKING:
    from octavo.bench.engine import Load

InputLen = Annotated[int, typer.Option(min=1, help="Tokens in each prompt.")]
OutputLen = Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")]
NumPrompts = Annotated[int, typer.Option(min=1, help="Number of requests.")]
Seed = Annotated[int, typer.Option(help="Seed of the random prompts; the same seed gives the same prompts.")]
OutputJson = Annotated[Path | None, typer.Option(help="Also write the figures to this file, as JSON.")]


class EndpointKind(StrEnum):
    completions = "completions"
    chat = "chat"


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure the engine, or any OpenAI-compatible server.")
    bench.command(cls=Command)(throughput)
    bench.command(cls=Command)(latency)
    bench.command(cls=Command)(roofline)
    bench.command()(serve)
    app.add_typer(bench, name="bench")


@engine_flags
def throughput(
    config: EngineConfig,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    num_prompts: NumPrompts = 64,
    repeat: Annotated[
        int, typer.Option(min=1, help="Number of runs; the run with the median output rate is shown.")
    ] = 1,
    seed: Seed = 0,
    output_json: OutputJson = None,
) -> None:
    """Run many prompts at once in the engine, and report tokens per second."""
    from octavo.bench.engine import Load, run_batches
    from octavo.bench.report import median_run, show

    config = dataclasses.replace(config, enable_prefix_caching=False)
    load = Load(batches=repeat, batch_size=num_prompts, input_len=input_len, output_len=output_len, seed=seed)
    runs, load_seconds = run_batches(config, load)
    show("throughput", _settings(config, load), median_run(runs) | {"load_seconds": load_seconds}, output_json)


@engine_flags
def latency(
    config: EngineConfig,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests in a batch.")] = 1,
    iterations: Annotated[int, typer.Option(min=1, help="Number of batches, run one after another.")] = 10,
    seed: Seed = 0,
    output_json: OutputJson = None,
) -> None:
    """Run small batches one after another and report the latency of requests."""
    from octavo.bench.engine import Load, run_batches
    from octavo.bench.report import joined, show, summarize

    config = dataclasses.replace(config, enable_prefix_caching=False)
    load = Load(batches=iterations, batch_size=batch_size, input_len=input_len, output_len=output_len, seed=seed)
    runs, load_seconds = run_batches(config, load)
    show("latency", _settings(config, load), summarize(joined(runs)) | {"load_seconds": load_seconds}, output_json)


@engine_flags
def roofline(
    config: EngineConfig,
    seed: Seed = 0,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot throughput by batch size and cost per token by context to this .png or .svg file."),
    ] = None,
    output_json: OutputJson = None,
) -> None:
    """Measure the machine's peak rates, which share of them decode and prefill steps reach, and where time is spent."""
    from octavo.bench import plot as bench_plot
    from octavo.bench import roofline as bench_roofline
    from octavo.bench.report import write_json

    if plot:
        bench_plot.check_plot(plot)
    ceilings, steps = bench_roofline.measure(config, seed, for_plot=plot is not None)
    settings = {"seed": seed, "engine": _engine_settings(config)}
    write_json("roofline", settings, {"ceilings": dataclasses.asdict(ceilings), "steps": steps}, output_json)
    if plot:
        threads = f"{ceilings.threads} threads, " if ceilings.threads else ""
        bench_plot.plot(f"{config.model_name}, {threads}{ceilings.isa}", steps, plot)
    bench_roofline.print_tables(ceilings, steps)


def serve(
    base_url: Annotated[
        str, typer.Option(help="Address of the server, such as http://127.0.0.1:8000, with or without /v1.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Model to request; by default the first that the server lists.")
    ] = None,
    endpoint: Annotated[EndpointKind, typer.Option(help="API to use.")] = EndpointKind.completions,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    num_prompts: NumPrompts = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at the same time, at most.")] = 64,
    request_rate: Annotated[
        float | None, typer.Option(min=0.001, help="Arrivals per second, at random times; by default all at once.")
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            help="Send ignore_eos, so that every output has output-len tokens; turn it off for servers that refuse it."
        ),
    ] = True,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="API key of the server.")] = None,
    seed: Seed = 0,
    write_trace: Annotated[
        Path | None, typer.Option(help="Write the requests and their times to this file, for octavo simulate.")
    ] = None,
    output_json: OutputJson = None,
) -> None:
    """Send streaming requests to an OpenAI-compatible server and report throughput and latencies."""
    import uvloop

    from octavo.bench.http import find_endpoint, measure, random_prompts
    from octavo.bench.report import progress, show, summarize
    from octavo.simulation.trace import trace_of
    from octavo.simulation.trace import write_trace as write

    path = "/chat/completions" if endpoint == EndpointKind.chat else "/completions"
    target = find_endpoint(base_url, path, model, api_key, ignore_eos)
    prompts = random_prompts(num_prompts, input_len, seed)
    with progress("Requests", num_prompts) as advance:
        run = uvloop.run(measure(target, prompts, output_len, concurrency, request_rate, seed, advance))
    if write_trace:
        write(write_trace, trace_of(run))
    settings = {
        "base_url": target.base_url,
        "model": target.model,
        "endpoint": endpoint.value,
        "input_len": input_len,
        "output_len": output_len,
        "num_prompts": num_prompts,
        "concurrency": concurrency,
        "request_rate": request_rate,
        "seed": seed,
    }
    show("serve", settings, summarize(run), output_json)
    errors = Counter(request.error for request in run.requests if request.error)
    for error, count in errors.most_common(3):
        typer.echo(f"octavo: {count} failed: {printable(error or '', lines=False)}", err=True)


def _settings(config: EngineConfig, load: "Load") -> dict[str, Any]:
    return dataclasses.asdict(load) | {"engine": _engine_settings(config)}


def _engine_settings(config: EngineConfig) -> dict[str, Any]:
    given = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    return given | {"threads": config.num_threads}
