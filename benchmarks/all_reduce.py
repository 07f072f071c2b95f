"""Time of an all-reduce between the ranks of a model, processes on one machine (csrc/runtime/rank_group.h).

Runs a program of many small layers, once with an all-reduce in each and once with the residual alone, in as many
processes at the same time. Prints the difference per layer, in microseconds, and the time of a program's barriers
alone (one row, few columns). The machine must be idle.

    python benchmarks/all_reduce.py --ranks 2 --rows 64 --columns 2048
"""

import argparse
import os
import time

import numpy as np

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.backends.cpu._native import Program, available_isas
from octavo.backends.cpu.rank_process import share_memory
from octavo.machine import share_of_cores

LAYERS, NARROW, TOKENS = 4, 32, 64


def make_program(rank: int, ranks: int, file: int, rows: int, columns: int, reduces: bool) -> Program:
    """Return a program of LAYERS narrow layers; with `reduces`, one of several ranks, else one of its own."""
    program = Program(
        isa=available_isas()[0], processors=[sorted(os.sched_getaffinity(0))], vocab=TOKENS, heads=1, kv_heads=1,
        head_dim=32, layers=1, norm_eps=1e-5, page_size=32, max_rows=rows, max_sampled=1, frequencies=[1.0] * 16,
        rank=rank, ranks=ranks if reduces else 1, group=file,
    )  # fmt: skip
    wide, narrow = (program.vector(np.ones(width, np.float32)) for width in (columns, NARROW))
    table = program.weight(TOKENS, columns)
    inner, outer = program.weight(NARROW, columns), program.weight(columns, NARROW)
    x = program.embed(table)
    for _ in range(LAYERS):
        y = program.norm(program.linear(program.norm(x, wide), inner, -1, -1), narrow)
        x = program.all_reduce(program.linear(y, outer, -1, -1), -1, x) if reduces else program.linear(y, outer, -1, x)
    program.finish(program.sampled_rows(x))
    random = np.random.default_rng(0)
    for weight, shape in ((table, (TOKENS, columns)), (inner, (NARROW, columns)), (outer, (columns, NARROW))):
        values = random.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
        program.pack(weight, [(values.view(np.uint8), "F32", None)], *shape)
    program.allocate_kv(-(-rows // 32))
    return program


def seconds(program: Program, rows: int, steps: int) -> np.ndarray:
    """Return the time of each of some steps of `rows` rows."""
    positions = np.arange(rows, dtype=np.int32)
    batch = StepBatch(
        tokens=positions % TOKENS,
        positions=positions,
        query_start=np.array([0, rows], np.int32),
        page_tables=np.arange(-(-rows // 32), dtype=np.int32)[None],
        sample_rows=positions[:1],
        sampling=SamplingBatch.greedy(1),
    )
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        program.logits(batch)
        times.append(time.perf_counter() - began)
    return np.array(times)


def run(rank: int, ranks: int, files: list[int], rows: int, columns: int, steps: int) -> None:
    os.sched_setaffinity(0, share_of_cores(rank, ranks))
    for (some_rows, some_columns), file in zip(((rows, columns), (1, 64)), files, strict=True):
        reduced = make_program(rank, ranks, file, some_rows, some_columns, reduces=True)
        alone = make_program(rank, ranks, -1, some_rows, some_columns, reduces=False)
        for program in (reduced, alone):
            seconds(program, some_rows, 3)
        both = [[seconds(program, some_rows, 1)[0] for program in (reduced, alone)] for _ in range(steps)]
        if rank == 0:
            with_it, without = np.array(both).T * 1e6 / LAYERS
            print(
                f"{ranks} ranks, {some_rows} x {some_columns} floats: median "
                f"{np.median(with_it) - np.median(without):.1f} us, best {with_it.min() - without.min():.1f} us; "
                f"a layer without it takes {np.median(without):.1f} us"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    files = [share_memory(f"bench-{i}") for i in range(2)]
    children = []
    for rank in range(1, arguments.ranks):
        if (child := os.fork()) == 0:
            run(rank, arguments.ranks, files, arguments.rows, arguments.columns, arguments.steps)
            os._exit(0)
        children.append(child)
    run(0, arguments.ranks, files, arguments.rows, arguments.columns, arguments.steps)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
