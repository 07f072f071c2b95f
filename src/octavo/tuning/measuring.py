"""Measure the machine with a model: which threads and pages are the fastest, and what steps cost with them."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import load_engine, plan_engine
from octavo.errors import ConfigError
from octavo.frontend.progress import loading_bar
from octavo.machine import available_cores, physical_cores
from octavo.simulation import CostModel
from octavo.simulation.measure import Piece, measure, step_batch, time_steps

from .goal import Load

BUDGET = 10.0  # seconds for the steps of a cost model; those of a large model are timed fewer times
SCREEN_BUDGET = 3.0  # seconds for the few steps that compare threads and page sizes
PAGE_SIZES = (32, 128)
GAIN = 0.03  # a share of the time below which a difference is noise, and the default stays
DECODES, CHUNK = (1, 8, 32), 256  # steps that are compared: so many sequences with a token each; a piece of a prompt


@dataclass(frozen=True)
class Screened:
    """The milliseconds of a few steps with some number of threads and page size: `steps` by their description."""

    threads: int
    page_size: int
    steps: dict[str, float]

    def beats(self, other: "Screened") -> bool:
        """Return whether these steps are faster by more than noise, in the geometric mean."""
        ratios = [math.log(self.steps[name] / other.steps[name]) for name in self.steps if name in other.steps]
        return sum(ratios) / len(ratios) < math.log(1 - GAIN)


def screen(
    config: EngineConfig, path: Path, load: Load, fixed: set[str], report: Callable[[Screened], None]
) -> tuple[EngineConfig, list[Screened]]:
    """Time a few steps with several numbers of threads, then with several page sizes.

    Args:
        fixed: Names of the settings that stay as they are.
        report: Called with each measurement.

    Returns:
        The settings with the fastest threads and page size, and all measurements, the best one first.
    """
    threads = [config.num_threads] if "threads" in fixed else thread_counts()
    sizes = [config.kv_cache_page_size] if "kv_cache_page_size" in fixed else list(PAGE_SIZES)
    tried: list[Screened] = []
    best: Screened | None = None
    for count, page_size in [(count, sizes[0]) for count in threads] + [(0, size) for size in sizes[1:]]:
        count = count or (best.threads if best else config.num_threads)
        candidate = dataclasses.replace(config, threads=count, kv_cache_page_size=page_size)
        with _engine(candidate, path) as engine:
            result = Screened(count, page_size, _few_steps(engine, load))
        report(result)
        tried.append(result)
        best = result if best is None or result.beats(best) else best
    assert best is not None
    chosen = dataclasses.replace(config, threads=best.threads, kv_cache_page_size=best.page_size)
    return chosen, sorted(tried, key=lambda each: each is not best)


def thread_counts() -> list[int]:
    """Return the numbers of threads to compare, the default first."""
    every, cores = available_cores(), physical_cores()
    return list(dict.fromkeys(count for count in (every, min(every, cores), every // 2) if count))


def check_length(config: EngineConfig, path: Path, load: Load) -> None:
    """Raise ConfigError if the model's context is too short for the load. Reads no weights."""
    length, most = load.input_len + load.output_len, plan_engine(config, path).max_model_len
    if length > most:
        raise ConfigError(
            f"a request of this load has {length:,} tokens, and the model takes {most:,} (max_model_len): give a "
            "shorter --input-len or --output-len"
        )


def costs_of(config: EngineConfig, path: Path) -> CostModel:
    """Return the cost model of an engine with these settings."""
    with _engine(config, path) as engine:
        costs, _ = measure(engine, config, budget=BUDGET)
    return costs


@contextmanager
def _engine(config: EngineConfig, path: Path) -> Iterator[Engine]:
    with loading_bar() as loaded:
        engine = load_engine(config, path, loaded)
    try:
        yield engine
    finally:
        engine.close()


def _few_steps(engine: Engine, load: Load) -> dict[str, float]:
    """Return the milliseconds of a few steps by their description."""
    context = min(load.input_len + load.output_len // 2, engine.max_model_len - 1, 2048)
    room = engine.kv.pool.num_pages // engine.kv.pages_for(context + 1)
    steps = {_decode(n): Piece(n, 1, context) for n in DECODES if n <= min(room, engine.scheduler.max_running)}
    chunk = min(CHUNK, engine.max_model_len, engine.scheduler.max_batch_tokens)
    steps[f"prompt of {chunk}"] = Piece(1, chunk, sampled=False)
    batches = [step_batch(engine, [piece]) for piece in steps.values()]
    seconds = time_steps(engine, batches, "Comparing", budget=SCREEN_BUDGET, typical=min)
    return {name: 1000 * each for name, each in zip(steps, seconds, strict=True)}


def _decode(sequences: int) -> str:
    return f"{sequences} {'stream' if sequences == 1 else 'streams'}"
