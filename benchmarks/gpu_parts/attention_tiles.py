"""The tilings of attention on a GPU: do they agree to the bit, and which is fastest?

    python -m gpu_parts.attention_tiles [check] [time] [tune] [--seconds 120]

(with benchmarks/ and src/ in PYTHONPATH). `check` computes the same rows in tiles of every size, alone, in chunks and
in parts, and compares all bits, and the distance from float64. `time` measures the tilings that attention_plan.tilings
picks in Llama-3.1-8B's shapes; `tune` measures others too.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from octavo.backends.cuda.kernels.attention import attention
from octavo.backends.cuda.kernels.attention_plan import Tiling, plan, tilings
from octavo.backends.cuda.kernels.rope_and_cache import KvPool, StepRows

from .attention_case import Case, on_device
from .timing import device_seconds

HMMA = [Tiling(16, 4, 3), Tiling(16, 8, 3), Tiling(32, 8, 3)]
HGMMA = [Tiling(64, 4, 3), Tiling(64, 8, 3), Tiling(128, 8, 3)]
SHAPES = [(32, 8, 128, False), (32, 8, 128, True), (9, 3, 64, False), (8, 4, 256, False), (8, 8, 96, False)]
LENGTHS = [1100, 70, 2100]
COMPARED = 200  # the last rows of the first sequence
LAYERS = 4  # between two measurements of a layer, the others replace its data in the L2 cache


def disagreements(heads: int, kv_heads: int, head_dim: int, int8: bool) -> Iterator[tuple[str, int, int]]:
    """Compare the last rows of a sequence, computed in many ways, with each row alone in tiles of 16 queries.

    Yields: what was compared, how many rows differ, and of how many.
    """
    case = Case.random(LENGTHS, heads, kv_heads, head_dim, "cuda")
    pool, tables = case.pool(32, int8)
    first, count = LENGTHS[0] - COMPARED, COMPARED
    every = [(0, position, 1) for position in range(first, first + count)]
    sizes = HMMA[0], HGMMA[1]
    for window in (0, 600):
        alone = torch.cat(case.run(every, pool, tables, sizes, window=window, slots=0))
        expected = case.reference((0, first, count), pool, tables, window)
        error = ((alone.double() - expected).norm() / expected.norm()).item()
        yield f"window {window}: relative error {error:.1e}, rows above 1e-2", int(error > 1e-2), 1

        def compare(got: list[Tensor], at: int = first, alone: Tensor = alone) -> tuple[int, int]:
            rows = torch.cat(got)
            same = rows.view(torch.int32) == alone[at - first : at - first + len(rows)].view(torch.int32)
            return int((~same.all(dim=1)).sum()), len(rows)

        yield f"window {window}: in parts", *compare(case.run(every, pool, tables, sizes, window=window))
        for tiling in [*HMMA[1:], *HGMMA]:
            try:
                chunk = case.run([(0, first, count)], pool, tables, (HMMA[0], tiling), window=window, slots=0)
                yield f"window {window}: a chunk, {tiling}", *compare(chunk)
                got = case.run(every, pool, tables, (tiling, HGMMA[2]), window=window)
                yield f"window {window}: single rows in parts, {tiling}", *compare(got)
            except Exception as error:  # of a tiling that the device cannot hold, for example
                yield f"window {window}: {tiling}: {type(error).__name__} {str(error)[:80]}", 0, 0
        mixed = [
            (1, LENGTHS[1] - 1, 1),
            (0, first + count // 4, count // 2),
            (2, LENGTHS[2] - 1, 1),
            (2, LENGTHS[2] - 600, 64),
        ]
        for programs in (None, 7):
            got = case.run(mixed, pool, tables, sizes, window=window, programs=programs, slots=1 << 14)
            yield f"window {window}: among others, {programs} programs", *compare(got[1:2], first + count // 4)
        moved = case.pool(64, int8, seed=1)
        yield f"window {window}: other pages", *compare(case.run([(0, first, count)], *moved, sizes, window=window))


@dataclass(frozen=True)
class Load:
    """Attention of one step in Llama-3.1-8B's shapes: sequences with `rows` rows each at the end of `context`."""

    sequences: int
    rows: int
    context: int

    @property
    def read_bytes(self) -> int:
        return self.sequences * self.context * 2 * 8 * 128 * 2

    @property
    def operations(self) -> float:
        seen = self.rows * (self.context - self.rows) + self.rows * (self.rows + 1) / 2
        return 4.0 * self.sequences * seen * 32 * 128


DECODE = [Load(1, 1, 1024), Load(8, 1, 1024), Load(64, 1, 1024), Load(256, 1, 1024), Load(1, 1, 32768)]
CHUNKS = [Load(1, 512, 512), Load(1, 8192, 8192), Load(1, 512, 16384)]


def seconds(load: Load, sizes: tuple[Tiling, Tiling], page_size: int, int8: bool, per_processor: int) -> float:
    """Return the time of a layer, for `per_processor` programs of decoding on each multiprocessor."""
    pages = -(-load.context // page_size)
    total = load.sequences * pages
    pool = KvPool.allocate(total, LAYERS, 8, page_size, 128, int8, "cuda")
    if int8:
        pool.memory.fill_(1)
    else:
        pool.values.normal_()
    tables = torch.randperm(total, dtype=torch.int32, device="cuda").view(load.sequences, pages)
    query_start = np.arange(load.sequences + 1, dtype=np.int32) * load.rows
    positions = np.tile(np.arange(load.context - load.rows, load.context, dtype=np.int32), load.sequences)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    slots = 4096
    cut = plan(query_start, positions, 4, sizes[0].rows, sizes[1].rows, slots, -(-2 * processors // 8))
    work, parts = on_device(cut, sizes, pool, 32, slots, per_processor * processors)
    rows = StepRows(torch.from_numpy(positions).cuda(), torch.empty(0), tables)
    q = torch.randn(len(positions), 32, 128, device="cuda").bfloat16()
    out = torch.empty(len(positions), 32 * 128, device="cuda", dtype=torch.bfloat16)
    return device_seconds([partial(attention, q, pool, rows, work, parts, layer, 0, out) for layer in range(LAYERS)])


def figure(load: Load, took: float) -> str:
    if load.rows == 1:
        return f"{took * 1e6:8.1f} us  {load.read_bytes / took / 1e12:5.2f} TB/s"
    return f"{took * 1e6:8.1f} us  {load.operations / took / 1e12:5.0f} TFLOP/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["check", "time", "tune"], default=["check", "time"])
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    for shape in SHAPES if "check" in options.what else ():
        print(f"heads {shape[0]}, kv heads {shape[1]}, head_dim {shape[2]}, {'int8' if shape[3] else 'bf16'}")
        for what, differing, rows in disagreements(*shape):
            print(f"  {'!' if differing or not rows else '+'} {what}: {differing} of {rows} differ", flush=True)
        if time.monotonic() > end:
            return
    hopper = torch.cuda.get_device_capability()[0] == 9
    small, large = tilings(128, 4, False, hopper)
    for load in DECODE + CHUNKS if "time" in options.what else ():
        print(f"{load} {figure(load, seconds(load, (small, large), 32, False, 4))}", flush=True)
    if "tune" in options.what:
        tune(small, large, end)


def tune(small: Tiling, large: Tiling, end: float) -> None:
    """Measure tilings, page sizes and int8."""
    for load in DECODE[2:4]:
        for page_size, int8 in ((32, False), (64, False), (64, True)):
            for tiling in (Tiling(16, w, s) for w in (4, 8) for s in (2, 3, 5)):
                for per_processor in (2, 3, 4, 8):
                    took = seconds(load, (tiling, large), page_size, int8, per_processor)
                    what = f"{load} pages of {page_size} {'int8' if int8 else 'bf16'}"
                    print(f"{what} {tiling} x{per_processor} {figure(load, took)}", flush=True)
                    if time.monotonic() > end:
                        return
    for load in CHUNKS:
        for page_size in (32, 64):
            for tiling in (Tiling(128, 8, 2), Tiling(128, 8, 3), Tiling(64, 8, 3), Tiling(64, 8, 2), Tiling(64, 4, 3)):
                took = seconds(load, (small, tiling), page_size, False, 4)
                print(f"{load} pages of {page_size} {tiling} {figure(load, took)}", flush=True)
                if time.monotonic() > end:
                    return


if __name__ == "__main__":
    main()
