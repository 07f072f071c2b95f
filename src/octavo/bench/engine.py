"""Benchmarks of the engine alone, stepped in this process: token ids in, token ids out."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import load_engine
from octavo.engine.messages import EngineRequest
from octavo.errors import OctavoError, PromptTooLong
from octavo.frontend.progress import loading_bar
from octavo.params import SamplingParams
from octavo.text import Tokenizer
from octavo.tracing.events import name_engine, name_process
from octavo.tracing.file import TraceFile
from octavo.weights import resolve

from .report import RequestTimes, Run, progress


@dataclass(frozen=True)
class Load:
    """Batches of `batch_size` prompts, each with `input_len` random tokens and `output_len` tokens of output."""

    batches: int
    batch_size: int
    input_len: int
    output_len: int
    seed: int


def run_batches(config: EngineConfig, load: Load) -> tuple[list[Run], float]:
    """Load an engine, warm it up and run every batch.

    Returns:
        The runs, and the seconds that loading took.
    """
    path = resolve(config.model, config.revision)
    trace = _open_trace(config)
    started = time.perf_counter()
    tokenizer = Tokenizer.load(path)
    with loading_bar() as loaded:
        engine = load_engine(config, path, loaded)
    load_seconds = time.perf_counter() - started
    try:
        warm_up = random_prompts(tokenizer, count=4, length=min(load.input_len, 32), seed=-1)
        run_batch(engine, warm_up, min(load.output_len, 8), advance=lambda _: None)
        with progress("Generating", load.batches * load.batch_size * load.output_len) as advance:
            seeds = range(load.seed, load.seed + load.batches)
            batches = [random_prompts(tokenizer, load.batch_size, load.input_len, seed) for seed in seeds]
            return [run_batch(engine, prompts, load.output_len, advance, trace) for prompts in batches], load_seconds
    finally:
        engine.close()
        if trace is not None:
            trace.close()


def _open_trace(config: EngineConfig) -> TraceFile | None:
    if config.trace is None:
        return None
    trace, pid = TraceFile(config.trace), os.getpid()
    trace.write(name_process(pid, "octavo bench") + name_engine(pid, config.model_name, 0))
    return trace


def random_prompts(tokenizer: Tokenizer, count: int, length: int, seed: int) -> list[list[int]]:
    """Return `count` prompts of `length` random tokens, none of them special. The same seed gives the same prompts."""
    rng = random.Random(seed)
    tokens: list[int] = []
    while len(tokens) < count * length:
        token = rng.randrange(tokenizer.vocab_size)
        if tokenizer.decode([token], skip_special_tokens=True):
            tokens.append(token)
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


def run_batch(
    engine: Engine,
    prompts: list[list[int]],
    output_len: int,
    advance: Callable[[int], None],
    trace: TraceFile | None = None,
) -> Run:
    """Add every prompt to the engine and step it until each has `output_len` greedy tokens.

    Args:
        advance: Called after each step with the number of new tokens.
        trace: Takes the engine's events after each step.

    Raises:
        PromptTooLong: Prompt and output do not fit in the model's context.
    """
    longest = max(map(len, prompts)) + output_len
    if longest > engine.info.max_model_len:
        raise PromptTooLong(
            f"{longest} tokens of prompt and output do not fit in the context of {engine.info.max_model_len}"
        )
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, seed=0)
    before = engine.stats()
    started = time.perf_counter()
    requests = {str(i): RequestTimes(started, len(prompt)) for i, prompt in enumerate(prompts)}
    for id, prompt in zip(requests, prompts, strict=True):
        engine.add(EngineRequest(id=id, prompt=prompt, params=params))
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter()
        if trace is not None and engine.trace is not None:
            trace.write_records(engine.trace.take())
        for output in outputs:
            if output.finish_reason == "error":
                raise OctavoError(f"a request failed in the engine: {output.message}")
            request = requests[output.id]
            request.arrivals.append(now)
            request.output_tokens += 1
        advance(len(outputs))
    seconds = time.perf_counter() - started
    after = engine.stats()
    stepping = after.step_seconds - before.step_seconds
    computing = after.backend_seconds - before.backend_seconds
    return Run(list(requests.values()), seconds, python_share=1 - computing / stepping)
