"""octavo bench roofline: what steps take beside what this machine could do at best, and where their time goes.

The model of Williams, Waterman and Patterson ("Roofline", 2009): a step cannot be faster than its bytes at the rate of
memory, nor than its operations at the rate of arithmetic; the later of the two is its floor.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from octavo.backends.cpu.backend import CpuBackend
from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import load_engine
from octavo.engine.messages import EngineRequest
from octavo.errors import ConfigError, OctavoError
from octavo.frontend.progress import loading_bar
from octavo.params import SamplingParams
from octavo.weights import resolve

from .report import progress

BATCH_SIZES, CONTEXT, PREFILLS = (1, 8, 64, 256), 128, (512, 2048)
MORE_BATCH_SIZES, MORE_CONTEXTS = (2, 4, 16, 32, 128), (512, 1024, 2048, 4096, 7500)  # for the plot
WARM_UP, STEPS = 2, 12  # of decode, for each figure
PREFILL_RUNS = 3
# Where time goes: name -> ops of the native program. What is left of them is row-wise, what is left of the step host.
PARTS = {"linear": ("linear",), "attention": ("attention",), "head": ("head",), "sampling": ("sample",)}
SHARES = (*PARTS, "row_wise", "host")


@dataclass(frozen=True)
class Ceilings:
    """The most that `threads` threads get out of this machine, with the kernels of instruction set `isa`."""

    isa: str
    threads: int
    bytes_per_second: float  # read from memory
    operations_per_second: float  # of bf16 dot products; a multiplication and an addition are two
    integer_operations_per_second: float  # of int8 ones


@dataclass(frozen=True)
class Work:
    """What a step cannot do without: bytes to and from memory, operations."""

    weight_bytes: float
    kv_bytes: float
    linear: float
    attention: float
    head: float
    integers: float = 0  # of the operations, so many are on int8

    def floor(self, ceilings: Ceilings) -> tuple[float, str]:
        """Seconds that it takes at least, and what by."""
        memory = (self.weight_bytes + self.kv_bytes) / ceilings.bytes_per_second
        floats = self.linear + self.attention + self.head - self.integers
        arithmetic = floats / ceilings.operations_per_second + self.integers / ceilings.integer_operations_per_second
        return max((memory, "memory"), (arithmetic, "compute"))


@dataclass(frozen=True)
class Measured:
    """Seconds (the median) of a decode step, or of a whole prefill with all its steps; `work` is that of each step.

    `context` is how many tokens each sequence has at the end; `shares` are parts of all the time, and add up to 1.
    """

    phase: str
    batch_size: int
    context: int
    tokens: int
    seconds: float
    work: Sequence[Work]
    shares: dict[str, float]

    def report(self, ceilings: Ceilings) -> dict[str, Any]:
        """As in the JSON report."""
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
    """Load the model and measure: the ceilings, and a report of every step. `for_plot`: of more batches and contexts.

    Leaves out what max_batch_size, max_model_len or the KV pool has no room for.
    """
    # On, because it lets many sequences have a context without waiting for it; no step that is timed profits.
    config = dataclasses.replace(config, enable_prefix_caching=True)
    if config.backend == "torch":
        raise ConfigError("bench roofline measures the native kernels: leave out backend torch")
    with loading_bar() as loaded:
        engine = load_engine(config, resolve(config.model, config.revision), loaded)
    try:
        assert isinstance(engine.backend, CpuBackend)
        before = engine.backend.ceilings()
        bench = Bench(engine, engine.backend, np.random.default_rng(seed))
        decodes, prefills = list(_decodes(engine, for_plot)), _prefills(engine)
        measured = []
        with progress("Measuring", len(decodes) + len(prefills)) as advance:
            for batch_size, context in decodes:
                measured.append(bench.decode(batch_size, context))
                advance(1)
            for length in prefills:
                measured.append(bench.prefill(length, config.max_batch_tokens))
                advance(1)
        # Another program may have been in the way: what was reached once can be reached.
        best = map(max, before, engine.backend.ceilings())
        ceilings = Ceilings(engine.backend.isa, config.num_threads, *best)
        return ceilings, [each.report(ceilings) for each in measured]
    finally:
        engine.close()


def _decodes(engine: Engine, for_plot: bool) -> Iterator[tuple[int, int]]:
    """Batch sizes and contexts (a whole number of pages) of the decode steps to measure."""
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
    """Steps an engine that has nothing else to do."""

    engine: Engine
    backend: CpuBackend
    random: np.random.Generator

    def decode(self, batch_size: int, context: int) -> Measured:
        """Steps of so many sequences with `context` tokens (whole pages), and a few more with every step."""
        prompts = [self._prompt(context + 1) for _ in range(batch_size)]
        self._add(prompts, max_tokens=1)
        while self.engine.has_work:
            self._step()
        # All their pages are in the cache now, so every sequence starts in the same step.
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
        """One prompt of so many tokens, `chunk` a step; its first token comes with it."""
        runs = []
        for run in range(1 + PREFILL_RUNS):
            if run == 1:  # the first is to warm up
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
        """The seconds it took."""
        started = time.perf_counter()
        outputs = self.engine.step()
        seconds = time.perf_counter() - started
        for output in outputs:
            if output.finish_reason == "error":
                raise OctavoError(f"the engine gave up on a request: {output.message}")
        return seconds

    def _shares(self, seconds: float) -> dict[str, float]:
        """What of `seconds` went where; ends the profile."""
        times = self.backend.times()
        self.backend.profile(False)
        shares = {part: sum(times.pop(op) for op in ops) / seconds for part, ops in PARTS.items()}
        row_wise = sum(times.values()) / seconds
        return shares | {"row_wise": row_wise, "host": 1 - row_wise - sum(shares.values())}

    def _work(self, sequences: int, before: int, new: int, sampled: bool) -> Work:
        """Of a step with the next `new` tokens of so many sequences that have `before` each, the last one sampled."""
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
    """A step's name is its phase, sequences × context. Work is in millions of bytes and 10⁹ operations."""
    machine = Table("", "", title="roofline", title_justify="left", show_header=False)
    machine.add_row("Memory, read (GB/s)", f"{ceilings.bytes_per_second / 1e9:,.1f}")
    machine.add_row(f"Products in bf16, {ceilings.isa} (GFLOP/s)", f"{ceilings.operations_per_second / 1e9:,.0f}")
    machine.add_row(f"Products in int8, {ceilings.isa} (GOP/s)", f"{ceilings.integer_operations_per_second / 1e9:,.0f}")
    machine.add_row("Threads", str(ceilings.threads))
    work = Table("Step", "Weights MB", "KV MB", "Linear GFLOP", "Attention", "Head")
    work.title = "What must be done"
    possible = Table("Step", "ms", "Tokens/s", "Floor (ms)", "Set by", "Achieved")
    possible.title = "What it takes, and what is possible"
    spent = Table("Step", *(share.replace("_", "-").capitalize() for share in SHARES))
    spent.title = "Where the time goes"
    for step in steps:
        name = f"{step['phase']} {step['batch_size']} × {step['context']:,}"
        mega = (f"{value / 1e6:,.0f}" for value in step["bytes"].values())
        giga = (f"{value / 1e9:,.2f}" for value in step["operations"].values())
        work.add_row(name, *mega, *giga)
        rate, achieved = f"{step['tokens_per_second']:,.0f}", f"{step['achieved']:.0%}"
        floor = f"{step['floor_milliseconds']:,.2f}"
        possible.add_row(name, f"{step['milliseconds']:,.2f}", rate, floor, step["limited_by"], achieved)
        spent.add_row(name, *(f"{step['shares'][share]:.1%}" for share in SHARES))
    for table in (machine, work, possible, spent):
        table.pad_edge, table.title_justify = False, "left"  # narrow, so that all of it fits into 80 columns
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.justify = "right"
    Console().print(machine, work, possible, spent)
