"""octavo bench: how fast the engine is (throughput, latency), what limits it (roofline), and any server (serve)."""

import dataclasses
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.config import EngineConfig

from .flags import Command, engine_flags

if TYPE_CHECKING:
    from octavo.bench.engine import Load

InputLen = Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")]
OutputLen = Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")]
NumPrompts = Annotated[int, typer.Option(min=1, help="Requests to make.")]
Seed = Annotated[int, typer.Option(help="The same seed makes the same prompts.")]
OutputJson = Annotated[Path | None, typer.Option(help="Write the figures to this file too.")]


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
    repeat: Annotated[int, typer.Option(min=1, help="Runs; the one with the median output rate is shown.")] = 1,
    seed: Seed = 0,
    output_json: OutputJson = None,
) -> None:
    """Give the engine many prompts at once: tokens per second when throughput is all that counts."""
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
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that run together.")] = 1,
    iterations: Annotated[int, typer.Option(min=1, help="Batches to run, one after another.")] = 10,
    seed: Seed = 0,
    output_json: OutputJson = None,
) -> None:
    """Run small batches one after another: the time a request takes when little else runs."""
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
        typer.Option(help="Draw throughput by batch size and cost per token by context: a .png or .svg file."),
    ] = None,
    output_json: OutputJson = None,
) -> None:
    """Measure what this machine can do, how near to it decode and prefill steps are, and where their time goes."""
    from octavo.bench import plot as bench_plot
    from octavo.bench import roofline as bench_roofline
    from octavo.bench.report import write_json

    if plot:
        bench_plot.check_plot(plot)
    ceilings, steps = bench_roofline.measure(config, seed, for_plot=plot is not None)
    settings = {"seed": seed, "engine": _engine_settings(config)}
    write_json("roofline", settings, {"ceilings": dataclasses.asdict(ceilings), "steps": steps}, output_json)
    if plot:
        bench_plot.plot(f"{config.model_name}, {ceilings.threads} threads, {ceilings.isa}", steps, plot)
    bench_roofline.print_tables(ceilings, steps)


def serve(
    base_url: Annotated[str, typer.Option(help="The server, such as http://127.0.0.1:8000; /v1 may follow.")],
    model: Annotated[str | None, typer.Option(help="Model to ask for; the server's first by default.")] = None,
    endpoint: Annotated[
        EndpointKind, typer.Option(help="Which of the two kinds of request.")
    ] = EndpointKind.completions,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    num_prompts: NumPrompts = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at the same time, at most.")] = 64,
    request_rate: Annotated[
        float | None, typer.Option(min=0.001, help="New requests a second, at random moments; all at once by default.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for all of output-len tokens; leave it out where servers refuse the field.")
    ] = True,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key of the server.")] = None,
    seed: Seed = 0,
    write_trace: Annotated[
        Path | None, typer.Option(help="Write what was sent, and when, for octavo simulate.")
    ] = None,
    output_json: OutputJson = None,
) -> None:
    """Load an OpenAI-compatible server with streamed requests, and time every token that comes back."""
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
        typer.echo(f"octavo: {count} failed: {error}", err=True)


def _settings(config: EngineConfig, load: "Load") -> dict[str, Any]:
    return dataclasses.asdict(load) | {"engine": _engine_settings(config)}


def _engine_settings(config: EngineConfig) -> dict[str, Any]:
    given = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    return given | {"threads": config.num_threads}
