"""Measure a cost model: time steps of chosen shapes on a real engine, and fit the costs to these times."""

import math
import platform
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.bench.report import progress
from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.messages import EngineRequest
from octavo.kv import Transfers
from octavo.params import SamplingParams
from octavo.simulation import CostModel, Shape
from octavo.simulation.costs import Curve
from octavo.version import __version__

# Row counts of the curves' points, up to the engine's limit. Kernels work on blocks of 8 or 16 rows, so some points lie
# on either side of a block.
KNOTS = (1, 2, 4, 8, 9, 16, 17, 24, 32, 33, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
CONTEXTS = (64, 512, 2048)  # of decoding sequences
BEFORE = (0, 2048)  # tokens before a chunk of a prompt
MOST_PAGES = 1200  # read by a step
ROUNDS = 7  # over all shapes, so that other load on the machine affects all of them alike
FEWEST_ROUNDS = 2
HOST_BATCHES, HOST_PROMPT, HOST_OUTPUT = (1, 4, 16, 64, 256), 64, 12
# Settings that the costs depend on; a simulation cannot change them.
MEASURED = (
    *("model", "revision", "backend", "device", "dtype", "quantization", "kv_cache_page_size", "kv_cache_dtype"),
    "tensor_parallel_size",
)


@dataclass(frozen=True)
class Piece:
    """A part of a step: `sequences` with `before` computed tokens each, and `new` ones to compute."""

    sequences: int
    new: int
    before: int = 0
    sampled: bool = True  # whether the last of the new tokens is sampled


def measure(
    engine: Engine,
    config: EngineConfig,
    clock: Callable[[], float] = time.perf_counter,
    budget: float = math.inf,
) -> tuple[CostModel, list[float]]:
    """Measure the costs of an idle engine.

    Args:
        budget: see time_steps.

    Returns:
        The cost model, and the ratio of modeled to measured time of each step that was timed.
    """
    steps = [step_batch(engine, pieces) for pieces in _steps(engine)]
    shapes = [Shape.of(batch) for batch in steps]
    seconds = time_steps(engine, steps, "Measuring", clock, budget)
    rows_ms, sampled_ms, kv_token_us, pair_us = _backend_costs(shapes, np.array(seconds))
    on_backend = CostModel(
        settings={name: getattr(config, name) for name in MEASURED} | {"threads": config.num_threads},
        machine={"cpu": _cpu(), "isa": getattr(engine.backend, "isa", None), "octavo": __version__},
        page_size=engine.kv.page_size,
        page_bytes=engine.backend.page_bytes,
        num_pages=engine.kv.pool.num_pages,
        max_model_len=engine.max_model_len,
        rows_ms=rows_ms,
        sampled_ms=sampled_ms,
        kv_token_us=kv_token_us,
        pair_us=pair_us,
        step_ms=0,
        sequence_us=0,
        row_us=0,
        seconds_per_page=_seconds_per_page(engine),
    )
    ratios = [on_backend.seconds(shape) / taken for shape, taken in zip(shapes, seconds, strict=True)]
    step, sequence, row = _host_costs(engine)
    host = {"step_ms": 1e3 * step, "sequence_us": 1e6 * sequence, "row_us": 1e6 * row}
    return msgspec.structs.replace(on_backend, **host), ratios


def time_steps(
    engine: Engine,
    steps: Sequence[StepBatch],
    label: str,
    clock: Callable[[], float] = time.perf_counter,
    budget: float = math.inf,
    typical: Callable[[list[float]], float] = statistics.median,
) -> list[float]:
    """Return the seconds of each step on an idle engine: what is typical of up to ROUNDS rounds.

    Args:
        label: of the progress bar.
        budget: Seconds after which no further round begins, once there are FEWEST_ROUNDS.
    """
    _fill_pages(engine, max(int(batch.page_tables.max()) for batch in steps) + 1)
    times: list[list[float]] = [[] for _ in steps]
    begun = time.monotonic()
    with progress(label, ROUNDS * len(steps)) as advance:
        for number in range(ROUNDS):
            if number >= FEWEST_ROUNDS and time.monotonic() - begun > budget:
                break
            for batch, taken in zip(steps, times, strict=True):
                started = clock()
                engine.backend.step(batch)
                taken.append(clock() - started)
                advance(1)
    return [typical(taken) for taken in times]


def _steps(engine: Engine) -> Iterator[list[Piece]]:
    """Yield the steps to time: decodes, prefills, and both together, up to the engine's limits."""
    scheduler, kv = engine.scheduler, engine.kv
    rows = _knots(scheduler.max_batch_tokens)
    steps = [[Piece(batch, 1, context)] for batch in _knots(scheduler.max_running) for context in CONTEXTS]
    steps += [[Piece(1, new, before)] for new in rows for before in BEFORE]
    steps += [[Piece(1, new, sampled=False)] for new in rows]
    steps += [[Piece(4, new // 4)] for new in rows if new >= 64]
    for batch in (8, 32, 128):
        steps.append([Piece(batch, 1, 256), Piece(1, rows[-1] - batch, sampled=False)])
    for pieces in steps:
        fits = all(0 < piece.new <= engine.max_model_len - piece.before for piece in pieces)
        slots = sum(piece.sequences for piece in pieces)
        pages = sum(piece.sequences * kv.pages_for(piece.before + piece.new) for piece in pieces)
        if fits and slots <= scheduler.max_running and pages <= min(MOST_PAGES, kv.pool.num_pages):
            yield pieces


def _knots(most: int) -> list[int]:
    return [*(knot for knot in KNOTS if knot < most), most]


def step_batch(engine: Engine, pieces: Sequence[Piece]) -> StepBatch:
    """Return a greedy step in which the sequences use pages 0, 1, 2, ... in order."""
    each = [piece for piece in pieces for _ in range(piece.sequences)]
    new = np.array([piece.new for piece in each], np.int32)
    before = np.array([piece.before for piece in each], np.int32)
    query_start = np.concatenate([np.zeros(1, np.int32), np.cumsum(new, dtype=np.int32)])
    counts = [engine.kv.pages_for(piece.before + piece.new) for piece in each]
    page_tables, taken = np.zeros((len(each), max(counts)), np.int32), 0
    for table, count in zip(page_tables, counts, strict=True):
        table[:count] = np.arange(taken, taken + count)
        taken += count
    rows = int(query_start[-1])
    sample_rows = query_start[1:][[piece.sampled for piece in each]] - np.int32(1)
    return StepBatch(
        tokens=np.random.default_rng(0).integers(0, engine.backend.spec.vocab_size, rows).astype(np.int32),
        positions=np.arange(rows, dtype=np.int32) + np.repeat(before - query_start[:-1], new),
        query_start=query_start,
        page_tables=page_tables,
        sample_rows=sample_rows,
        sampling=SamplingBatch.greedy(len(sample_rows)),
    )


def _fill_pages(engine: Engine, num_pages: int) -> None:
    """Write to pages 0 to num_pages: reads of memory that was never written all hit one cached page of zeros."""
    page_size = engine.kv.page_size
    together = max(1, min(engine.scheduler.max_batch_tokens // page_size, engine.scheduler.max_running))
    chunk = min(page_size, engine.scheduler.max_batch_tokens)
    for at in range(0, page_size, chunk):
        batch = step_batch(engine, [Piece(together, min(chunk, page_size - at), at, sampled=False)])
        for page in range(0, num_pages, together):
            tables = np.minimum(batch.page_tables + np.int32(page), np.int32(num_pages - 1))
            engine.backend.step(replace(batch, page_tables=tables))


def _backend_costs(shapes: Sequence[Shape], seconds: np.ndarray) -> tuple[Curve, Curve, float, float]:
    """Return the rows_ms, sampled_ms, kv_token_us and pair_us with the least squares of relative errors."""
    rows = sorted({shape.rows for shape in shapes})
    sampled = sorted({shape.sampled for shape in shapes} - {0})
    work = [
        [shape.rows == knot for knot in rows]
        + [shape.sampled == knot for knot in sampled]
        + [shape.kv_tokens, shape.pairs]
        for shape in shapes
    ]
    costs = nonnegative_fit(np.array(work, float) / seconds[:, None], np.ones(len(seconds)))
    *curves, kv_token_us, pair_us = (costs * ([1e3] * (len(rows) + len(sampled)) + [1e6, 1e6])).tolist()
    return (
        list(zip(rows, curves, strict=False)),
        list(zip(sampled, curves[len(rows) :], strict=True)),
        kv_token_us,
        pair_us,
    )


def _host_costs(engine: Engine) -> list[float]:
    """Return the seconds outside the backend: per step, per sequence in it, and per row."""
    samples: dict[tuple[int, int], list[float]] = {}
    rng = np.random.default_rng(0)
    for batch in HOST_BATCHES:
        for i in range(min(batch, engine.scheduler.max_running)):
            prompt: list[int] = rng.integers(0, engine.backend.spec.vocab_size, HOST_PROMPT).tolist()
            params = SamplingParams(temperature=0, max_tokens=HOST_OUTPUT, ignore_eos=True, seed=0)
            engine.add(EngineRequest(id=str(i), prompt=prompt, params=params))
        while engine.has_work:
            before = engine.stats()
            engine.step()
            after = engine.stats()
            if after.steps == before.steps:
                continue  # pages are being saved
            shape = max(before.running, after.running), after.tokens_computed - before.tokens_computed
            host = after.step_seconds - before.step_seconds - (after.backend_seconds - before.backend_seconds)
            samples.setdefault(shape, []).append(host)
    times = np.array([statistics.median(taken) for taken in samples.values()])
    work = np.array([[1, *shape] for shape in samples], float)
    costs: list[float] = nonnegative_fit(work / times[:, None], np.ones(len(times))).tolist()
    return costs


def _seconds_per_page(engine: Engine) -> float:
    """Return the seconds to fetch one page of many from the tier below the pool; 0 if there is no such tier."""
    transfers, keys = engine.kv.transfers, [secrets.token_bytes(16) for _ in range(min(64, engine.kv.pool.num_pages))]
    if transfers is None or not all(transfers.save(page, key) for page, key in enumerate(keys)):
        return 0.0
    _await(transfers, len(keys))
    started = time.perf_counter()
    fetched = [transfers.fetch(page, key) for page, key in enumerate(keys)]
    _await(transfers, sum(fetched))
    return (time.perf_counter() - started) / max(1, sum(fetched))


def _await(transfers: Transfers, count: int) -> None:
    while count:
        transfers.wait(1.0)
        count -= len(transfers.finished())


def nonnegative_fit(work: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return the costs >= 0 that minimize |work @ costs - times|², by coordinate descent.

    Shapes:
        work: float64 [N, K]. times: float64 [N]. Result: float64 [K].
    """
    scale = np.linalg.norm(work, axis=0)
    scale[scale == 0] = 1
    work = work / scale
    products, target = work.T @ work, work.T @ times
    costs = np.zeros(len(target))
    for _ in range(3000):
        for k in range(len(costs)):
            costs[k] = max(0.0, costs[k] + target[k] - products[k] @ costs)
    fit: np.ndarray = costs / scale
    return fit


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
