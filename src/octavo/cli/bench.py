"""octavo bench: how fast the engine is (throughput, latency), and how fast any OpenAI-compatible server is (serve)."""

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.config import EngineConfig

from .engine_flags import engine_flags

if TYPE_CHECKING:
    from octavo.engine.engine import Engine
    from octavo.text import Tokenizer

InputLen = Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")]
OutputLen = Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")]
NumPrompts = Annotated[int, typer.Option(min=1, help="Requests to make.")]
Seed = Annotated[int, typer.Option(help="The same seed makes the same prompts.")]
OutputJson = Annotated[Path | None, typer.Option(help="Write the figures to this file too.")]


class EndpointKind(StrEnum):
    completions = "completions"
    chat = "chat"


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure the engine, or any OpenAI-compatible server.", no_args_is_help=True)
    bench.command()(throughput)
    bench.command()(latency)
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
    from .bench_engine import random_prompts, run_batch
    from .bench_report import median_run, progress, show

    with _engine(config) as (engine, tokenizer, load_seconds):
        batches = [random_prompts(tokenizer, num_prompts, input_len, seed + i) for i in range(repeat)]
        with progress("Generating", repeat * num_prompts * output_len) as advance:
            runs = [run_batch(engine, prompts, output_len, advance) for prompts in batches]
    settings = _settings(config, input_len=input_len, output_len=output_len, num_prompts=num_prompts, seed=seed)
    show("throughput", settings, median_run(runs) | {"load_seconds": load_seconds}, output_json)


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
    from .bench_engine import random_prompts, run_batch
    from .bench_report import Run, progress, show, summarise

    with _engine(config) as (engine, tokenizer, load_seconds):
        batches = [random_prompts(tokenizer, batch_size, input_len, seed + i) for i in range(iterations)]
        with progress("Generating", iterations * batch_size * output_len) as advance:
            runs = [run_batch(engine, prompts, output_len, advance) for prompts in batches]
    whole = Run(
        requests=[request for run in runs for request in run.requests],
        seconds=sum(run.seconds for run in runs),
        python_share=statistics.mean(run.python_share or 0 for run in runs),
    )
    settings = _settings(config, input_len=input_len, output_len=output_len, batch_size=batch_size, seed=seed)
    show("latency", settings, summarise(whole) | {"load_seconds": load_seconds}, output_json)


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
    output_json: OutputJson = None,
) -> None:
    """Load an OpenAI-compatible server with streamed requests, and time every token that comes back."""
    import uvloop

    from .bench_http import find_endpoint, measure, random_prompts
    from .bench_report import progress, show, summarise

    path = "/chat/completions" if endpoint == EndpointKind.chat else "/completions"
    target = find_endpoint(base_url, path, model, api_key, ignore_eos)
    prompts = random_prompts(num_prompts, input_len, seed)
    with progress("Requests", num_prompts) as advance:
        run = uvloop.run(measure(target, prompts, output_len, concurrency, request_rate, seed, advance))
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
    show("serve", settings, summarise(run), output_json)
    errors = Counter(request.error for request in run.requests if request.error)
    for error, count in errors.most_common(3):
        typer.echo(f"octavo: {count} failed: {error}", err=True)


@contextmanager
def _engine(config: EngineConfig) -> Iterator[tuple["Engine", "Tokenizer", float]]:
    """A warm engine that caches no prompts, its tokenizer, and the seconds that loading took."""
    from octavo.engine.loading import load_engine
    from octavo.frontend.progress import loading_bar
    from octavo.text import Tokenizer
    from octavo.weights import resolve

    from .bench_engine import random_prompts, run_batch

    path = resolve(config.model, config.revision)
    started = time.perf_counter()
    tokenizer = Tokenizer.load(path)
    with loading_bar() as progress:
        engine = load_engine(dataclasses.replace(config, enable_prefix_caching=False), path, progress)
    load_seconds = time.perf_counter() - started
    try:
        run_batch(engine, random_prompts(tokenizer, count=4, length=32, seed=-1), output_len=8, advance=lambda _: None)
        yield engine, tokenizer, load_seconds
    finally:
        engine.close()


def _settings(config: EngineConfig, **settings: Any) -> dict[str, Any]:
    given = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    return settings | {"engine": given | {"enable_prefix_caching": False, "threads": config.num_threads}}
