"""octavo bench roofline: measure steps, the least time they could take on this machine, and where the time is spent.

The model is the roofline of Williams, Waterman and Patterson (Communications of the ACM, 2009): a step takes at least

    floor = max(bytes / memory bandwidth, operations / peak operations per second)
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rich.table import Table

from octavo.backends.cpu.backend import CpuBackend
from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import load_engine
from octavo.engine.messages import EngineRequest
from octavo.errors import ConfigError, OctavoError
from octavo.frontend.progress import loading_bar
from octavo.model.spec import DecoderSpec
from octavo.params import SamplingParams
from octavo.terminal import console
from octavo.weights import resolve

from .report import progress

BATCH_SIZES, CONTEXT, PREFILLS = (1, 8, 64, 256), 128, (512, 2048)
MORE_BATCH_SIZES, MORE_CONTEXTS = (2, 4, 16, 32, 128), (512, 1024, 2048, 4096, 7500)  # for the plot
WARM_UP, STEPS = 2, 12  # decode steps for each figure
PREFILL_RUNS = 3
# Parts of a step's time -> ops of the native program. The other ops are "row_wise"; time outside the program is "host".
PARTS = {"linear": ("linear",), "attention": ("attention",), "head": ("head",), "sampling": ("sample",)}


class Meter(Protocol):
    """What is measured of a backend and its machine.

    Attributes:
        isa: instruction set of the kernels, or the GPU's name.
        page_bytes: bytes of a KV page of `page_size` tokens.
        layer_bytes, head_bytes: bytes of weights that a step reads, of all layers and of the head.
        layer_integers, head_integers: the share of their operations that is in int8.
    """

    spec: DecoderSpec
    isa: str
    page_size: int
    page_bytes: int
    layer_bytes: int
    head_bytes: int
    layer_integers: float
    head_integers: float

    def ceilings(self) -> tuple[float, float, float]:
        """Measure bytes of memory per second, and operations per second of bf16 and of int8 products."""
        ...

    def profile(self, on: bool) -> None:
        """Start measuring where the time goes, from zero, or stop."""
        ...

    def times(self) -> dict[str, float]:
        """Return seconds since profile(True): by op of the native program, or of a GPU in "device"."""
        ...


@dataclass(frozen=True)
class Ceilings:
    """Peak rates of this machine with `threads` threads and kernels of instruction set `isa`, or of the GPU `isa`."""

    isa: str
    threads: int  # 0: a GPU
    bytes_per_second: float  # reading memory; of a GPU, copying it
    operations_per_second: float  # in bf16 dot products, where a multiplication and an addition count as two
    integer_operations_per_second: float  # in int8 dot products


@dataclass(frozen=True)
class Work:
    """The least work of a step: bytes read from memory, and operations by kind."""

    weight_bytes: float
    kv_bytes: float
    linear: float
    attention: float
    head: float
    integers: float = 0  # int8 operations among those above

    def floor(self, ceilings: Ceilings) -> tuple[float, str]:
        """Return the least seconds that the work takes, and the limiting resource: "memory" or "compute"."""
        memory = (self.weight_bytes + self.kv_bytes) / ceilings.bytes_per_second
        floats = self.linear + self.attention + self.head - self.integers
        arithmetic = floats / ceilings.operations_per_second + self.integers / ceilings.integer_operations_per_second
        return max((memory, "memory"), (arithmetic, "compute"))


@dataclass(frozen=True)
class Measured:
    """A measured decode step, or a whole prefill with all its steps.

    Attributes:
        context: Tokens of each sequence at the end.
        seconds: The median.
        work: The work of each step.
        shares: Fractions of the time by part; they add up to 1.
    """

    phase: str
    batch_size: int
    context: int
    tokens: int
    seconds: float
    work: Sequence[Work]
    shares: dict[str, float]

    def report(self, ceilings: Ceilings) -> dict[str, Any]:
        """Return its entry in the JSON report."""
        floors = [work.floor(ceilings) for work in self.work]
        floor, limit = sum(seconds for seconds, _ in floors), max(floors)[1]
        return {
            "phase": self.phase,
            "batch_size": self.batch_size,
            "context": self.context,
            "milliseconds": self.seconds * 1000,
            "tokens_per_second": self.tokens / self.seconds,
            "bytes": {key: sum(getattr(w, f"{key}_bytes") for w in self.work) for key in ("weight", "kv")},
            "operations": {key: sum(getattr(w, key) for w in self.work) for key in ("linear", "attention", "head")},
            "floor_milliseconds": floor * 1000,
            "limited_by": limit,
            "achieved": floor / self.seconds,
            "shares": self.shares,
        }


def measure(config: EngineConfig, seed: int, for_plot: bool) -> tuple[Ceilings, list[dict[str, Any]]]:
    """Load the model and measure. Steps beyond max_batch_size, max_model_len or the KV pool are left out.

    Args:
        for_plot: Whether to measure more batch sizes and contexts.

    Returns:
        The machine's peak rates, and a report of every step.
    """
    # Prefix caching gives many sequences a context at once. It does not shorten the steps that are timed.
    config = dataclasses.replace(config, enable_prefix_caching=True)
    if config.backend_name == "torch":
        raise ConfigError("bench roofline measures the kernels of Octavo: leave out backend torch")
    if config.tensor_parallel_size > 1:
        raise ConfigError("bench roofline measures one process: leave out tensor_parallel_size")
    with loading_bar() as loaded:
        engine = load_engine(config, resolve(config.model, config.revision), loaded)
    try:
        meter = _meter(engine)
        before = meter.ceilings()
        bench = Bench(engine, meter, np.random.default_rng(seed))
        decodes, prefills = list(_decodes(engine, for_plot)), _prefills(engine)
        measured = []
        with progress("Measuring", len(decodes) + len(prefills)) as advance:
            for batch_size, context in decodes:
                measured.append(bench.decode(batch_size, context))
                advance(1)
            for length in prefills:
                measured.append(bench.prefill(length, config.max_batch_tokens))
                advance(1)
        # Other programs may have slowed down one of the two measurements, so the faster one is nearer to the peak.
        best = map(max, before, meter.ceilings())
        ceilings = Ceilings(meter.isa, 0 if config.backend_name == "cuda" else config.num_threads, *best)
        return ceilings, [each.report(ceilings) for each in measured]
    finally:
        engine.close()


def _meter(engine: Engine) -> Meter:
    """Return what measures the engine's backend: the cpu backend itself, or the meter of the cuda backend."""
    if isinstance(engine.backend, CpuBackend):
        return engine.backend
    from octavo.backends.cuda.backend import CudaBackend

    assert isinstance(engine.backend, CudaBackend)
    return engine.backend.meter


def _decodes(engine: Engine, for_plot: bool) -> Iterator[tuple[int, int]]:
    """Yield (batch size, context) of the decode steps to measure. Contexts are whole pages."""
    page = engine.kv.page_size
    after = 1 + WARM_UP + STEPS
    longest = (engine.max_model_len - 1 - after) // page * page

    def whole(context: int) -> int:
        return min(-(-context // page) * page, longest)

    def fits(batch_size: int, context: int) -> bool:
        pages = batch_size * engine.kv.pages_for(context + 1 + after)
        return context > 0 and batch_size <= engine.scheduler.max_running and pages <= engine.kv.pool.num_pages

    batches = sorted(BATCH_SIZES + (MORE_BATCH_SIZES if for_plot else ()))
    contexts = sorted({whole(context) for context in MORE_CONTEXTS} - {whole(CONTEXT)}) if for_plot else []
    points = [(batch_size, whole(CONTEXT)) for batch_size in batches] + [(1, context) for context in contexts]
    return (point for point in points if fits(*point))


def _prefills(engine: Engine) -> list[int]:
    return sorted({min(length, engine.max_model_len - 1) for length in PREFILLS})


@dataclass(frozen=True)
class Bench:
    """Measures steps of an idle engine."""

    engine: Engine
    backend: Meter
    random: np.random.Generator

    def decode(self, batch_size: int, context: int) -> Measured:
        """Measure decode steps of `batch_size` sequences with `context` tokens each, which grow by one per step."""
        prompts = [self._prompt(context + 1) for _ in range(batch_size)]
        self._add(prompts, max_tokens=1)
        while self.engine.has_work:
            self._step()
        # The prefix cache now has all their pages, so every sequence starts in the same step.
        self._add(prompts, max_tokens=1 + WARM_UP + STEPS)
        for _ in range(1 + WARM_UP):
            self._step()
        self.backend.profile(True)
        seconds = [self._step() for _ in range(STEPS)]
        shares = self._shares(sum(seconds))
        while self.engine.has_work:
            self._step()
        middle = context + 1 + WARM_UP + STEPS // 2
        work = self._work(batch_size, middle, new=1, sampled=True)
        return Measured("decode", batch_size, middle + 1, batch_size, statistics.median(seconds), [work], shares)

    def prefill(self, length: int, chunk: int) -> Measured:
        """Measure the prefill of one prompt, `chunk` tokens per step, up to its first token of output."""
        runs = []
        for run in range(1 + PREFILL_RUNS):
            if run == 1:  # the first run is a warm-up
                self.backend.profile(True)
            self._add([self._prompt(length)], max_tokens=1)
            seconds = 0.0
            while self.engine.has_work:
                seconds += self._step()
            runs.append(seconds)
        shares = self._shares(sum(runs[1:]))
        starts = range(0, length, chunk)
        work = [self._work(1, at, min(chunk, length - at), sampled=at + chunk >= length) for at in starts]
        return Measured("prefill", 1, length, length, statistics.median(runs[1:]), work, shares)

    def _prompt(self, length: int) -> list[int]:
        prompt: list[int] = self.random.integers(0, self.backend.spec.vocab_size, length).tolist()
        return prompt

    def _add(self, prompts: list[list[int]], max_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, seed=0)
        for i, prompt in enumerate(prompts):
            self.engine.add(EngineRequest(id=str(i), prompt=prompt, params=params))

    def _step(self) -> float:
        """Run one engine step and return its seconds."""
        started = time.perf_counter()
        outputs = self.engine.step()
        seconds = time.perf_counter() - started
        for output in outputs:
            if output.finish_reason == "error":
                raise OctavoError(f"a request failed in the engine: {output.message}")
        return seconds

    def _shares(self, seconds: float) -> dict[str, float]:
        """End the profile, and return the fractions of `seconds` by part."""
        times = self.backend.times()
        self.backend.profile(False)
        if "device" in times:
            device = min(1.0, times["device"] / seconds)  # a step that is launched ahead may end later
            return {"device": device, "host": 1 - device}
        shares = {part: sum(times.pop(op) for op in ops) / seconds for part, ops in PARTS.items()}
        row_wise = sum(times.values()) / seconds
        return shares | {"row_wise": row_wise, "host": 1 - row_wise - sum(shares.values())}

    def _work(self, sequences: int, before: int, new: int, sampled: bool) -> Work:
        """Return the work of a step that computes `new` tokens of each sequence, after `before` computed ones."""
        spec, backend = self.backend.spec, self.backend
        seen = np.arange(before + 1, before + new + 1)  # by each new token, itself included
        pairs = kept = 0
        for window in spec.windows:
            pairs += int(np.minimum(seen, window).sum() if window else seen.sum())
            kept += new + (min(before, window - 1) if window else before)
        layer = (spec.qkv_size + spec.q_size + 3 * spec.intermediate_size) * spec.hidden_size
        linear = 2 * sequences * new * layer * spec.num_layers
        head = 2 * sequences * spec.vocab_size * spec.hidden_size if sampled else 0
        return Work(
            weight_bytes=backend.layer_bytes + (backend.head_bytes if sampled else 0),
            kv_bytes=sequences * kept * backend.page_bytes / (backend.page_size * spec.num_layers),
            linear=linear,
            attention=2 * 2 * sequences * pairs * spec.q_size,  # scores, and the sum of the values
            head=head,
            integers=linear * backend.layer_integers + head * backend.head_integers,
        )


def print_tables(ceilings: Ceilings, steps: list[dict[str, Any]]) -> None:
    """Print the report as tables. Steps are named by phase, sequences × context."""
    machine = Table("", "", title="roofline", title_justify="left", show_header=False)
    kind = "read" if ceilings.threads else "read and written"
    machine.add_row(f"Memory, {kind} (GB/s)", f"{ceilings.bytes_per_second / 1e9:,.1f}")
    machine.add_row(f"Products in bf16, {ceilings.isa} (GFLOP/s)", f"{ceilings.operations_per_second / 1e9:,.0f}")
    machine.add_row(f"Products in int8, {ceilings.isa} (GOP/s)", f"{ceilings.integer_operations_per_second / 1e9:,.0f}")
    if ceilings.threads:
        machine.add_row("Threads", str(ceilings.threads))
    work = Table("Step", "Weights MB", "KV MB", "Linear GFLOP", "Attention", "Head")
    work.title = "Least work of a step"
    possible = Table("Step", "ms", "Tokens/s", "Floor (ms)", "Limit", "Achieved")
    possible.title = "Time, and the least possible time"
    parts = list(steps[0]["shares"])
    spent = Table("Step", *(part.replace("_", "-").capitalize() for part in parts))
    spent.title = "Where the time goes"
    for step in steps:
        name = f"{step['phase']} {step['batch_size']} × {step['context']:,}"
        mega = (f"{value / 1e6:,.0f}" for value in step["bytes"].values())
        giga = (f"{value / 1e9:,.2f}" for value in step["operations"].values())
        work.add_row(name, *mega, *giga)
        rate, achieved = f"{step['tokens_per_second']:,.0f}", f"{step['achieved']:.0%}"
        floor = f"{step['floor_milliseconds']:,.2f}"
        possible.add_row(name, f"{step['milliseconds']:,.2f}", rate, floor, step["limited_by"], achieved)
        spent.add_row(name, *(f"{step['shares'][part]:.1%}" for part in parts))
    for table in (machine, work, possible, spent):
        table.pad_edge, table.title_justify = False, "left"  # narrow, so that all of it fits into 80 columns
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.justify = "right"
    console().print(machine, work, possible, spent)
