"""The speed of the cpu backend's steps, by rows and context, on SmolLM2: python benchmarks/steps.py

A decode step reads every weight once and the KV cache of every sequence once; a prefill step is limited by arithmetic.
Compared with the machine's limits, the last two columns show which of the two limits a step.
"""

import dataclasses
import statistics
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.backends.cpu import load
from octavo.backends.cpu.backend import CpuBackend
from octavo.config import EngineConfig
from octavo.model import describe_model
from octavo.weights import open_checkpoint, resolve

PAGE_SIZE, ROWS, PAGES = 32, 512, 1024
STEPS = [(1, 1, 128), (1, 1, 2000), (1, 1, 7500), (8, 1, 192), (16, 1, 192)]  # decode
STEPS += [(64, 1, 16), (64, 1, 192), (128, 1, 192)]
STEPS += [(1, 128, 0), (4, 128, 0), (1, 512, 0), (1, 512, 3584)]  # prefill: sequences, new tokens, positions before


def step_batch(sequences: int, new: int, before: int) -> StepBatch:
    """Return a batch of `new` tokens of each of `sequences` sequences, at position `before`; the last is sampled."""
    pages = -(-(before + new) // PAGE_SIZE)
    rows = sequences * new

    return StepBatch(
        tokens=np.random.default_rng(0).integers(10, 49000, rows).astype(np.int32),
        positions=np.tile(np.arange(before, before + new, dtype=np.int32), sequences),
        query_start=np.arange(0, rows + 1, new, dtype=np.int32),
        page_tables=np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages),
        sample_rows=np.arange(new - 1, rows, new, dtype=np.int32),
        sampling=SamplingBatch.greedy(sequences),
    )


def fill(backend: CpuBackend, pages: int) -> None:
    """Write to every page: memory that was never written reads as one page of zeros, which stays in the CPU's cache."""
    for page in range(0, pages, ROWS // PAGE_SIZE):
        batch = step_batch(ROWS // PAGE_SIZE, PAGE_SIZE, 0)
        backend.step(dataclasses.replace(batch, page_tables=batch.page_tables + np.int32(page)))


def seconds(backend: CpuBackend, batch: StepBatch) -> float:
    """Return the median of 15 steps, after three that touch the memory for the first time."""
    times = []
    for _ in range(18):
        start = time.perf_counter()
        backend.step(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def main() -> None:
    checkpoint = open_checkpoint(resolve("smollm2"))
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    backend = load(
        spec, parameters, page_size=PAGE_SIZE, max_batch_tokens=ROWS, max_batch_size=256, max_model_len=8192,
        threads=EngineConfig().num_threads, dtype="auto", quantization="none", device="auto",
        progress=lambda done, total: None,
    )  # fmt: skip
    backend.allocate_kv(PAGES)
    fill(backend, PAGES)
    head = spec.vocab_size * spec.hidden_size
    layers = backend.weight_bytes // 2 - head  # values, each used once per row
    table = Table("sequences", "new tokens", "before", "ms", "tokens/s", "GFLOP/s", "GB/s")
    for sequences, new, before in STEPS:
        time_taken = seconds(backend, step_batch(sequences, new, before))
        rows = sequences * new
        pairs = sequences * (new * before + new * (new + 1) / 2)  # (query, key), per layer and head
        attention = 4 * pairs * spec.q_size * spec.num_layers
        flop = 2 * (rows * layers + sequences * head) + attention
        kv_bytes = sequences * (before + new) * backend.page_bytes / PAGE_SIZE
        numbers = [f"{1e3 * time_taken:.1f}", f"{rows / time_taken:,.0f}", f"{flop / time_taken / 1e9:,.0f}"]
        numbers.append(f"{(backend.weight_bytes + kv_bytes) / time_taken / 1e9:.1f}")
        table.add_row(str(sequences), str(new), str(before), *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
