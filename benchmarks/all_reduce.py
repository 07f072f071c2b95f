"""Time of an all-reduce between the ranks of a model: processes on one machine, or with TCP between them.

Runs programs of few and of many small layers, with an all-reduce in each and with the residual alone, in as many
processes at the same time. The layers that the longer programs have more give the time of a layer with and without it:
prints the difference, in microseconds, and the same for one row of few columns, whose all-reduce only waits. What a
step needs once, such as the embedding, counts in neither. The machine must be idle.

    python benchmarks/all_reduce.py --ranks 2 --rows 64 --columns 2048

With --tcp, two ranks are a machine each (csrc/runtime/node_lines.h), over the loopback device or between two network
namespaces, such as a and b. Prints the time in which one byte, and as many as a rank sends, go there and back too: the
floor of what is measured.

    ip netns add a; ip netns add b; ip link add eth0 netns a type veth peer name eth0 netns b
    ip -n a addr add 10.78.0.1/24 dev eth0; ip -n b addr add 10.78.0.2/24 dev eth0
    ip -n a link set eth0 up; ip -n b link set eth0 up
    python benchmarks/all_reduce.py --tcp --address 10.78.0.1 --namespaces a b
"""

import argparse
import contextlib
import ctypes
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.backends.cpu._native import Program, available_isas
from octavo.backends.cpu.ranks import share_memory
from octavo.machine import share_of_cores

FEW, MANY, NARROW, TOKENS = 2, 6, 32, 64  # layers; columns; rows of the embedding


def make_program(
    rank: int, ranks: int, file: int | None, rows: int, columns: int, layers: int, lines: list[int]
) -> Program:
    """Return a program of narrow layers: one of several ranks, which share the memory `file`; or one of its own."""
    reduces = file is not None
    program = Program(
        isa=available_isas()[0], processors=[sorted(os.sched_getaffinity(0))], vocab=TOKENS, heads=1, kv_heads=1,
        head_dim=32, layers=1, norm_eps=1e-5, page_size=32, max_rows=rows, max_sampled=1, frequencies=[1.0] * 16,
        rank=rank, ranks=ranks if reduces else 1, group=file if reduces else -1, lines=lines if reduces else [],
    )  # fmt: skip
    wide, narrow = (program.vector(np.ones(width, np.float32)) for width in (columns, NARROW))
    table = program.weight(TOKENS, columns)
    inner, outer = program.weight(NARROW, columns), program.weight(columns, NARROW)
    x = program.embed(table, 0, [0, TOKENS] if reduces and lines else [])
    for _ in range(layers):
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


def run(rank: int, ranks: int, files: list[int], rows: int, columns: int, steps: int, lines: list[int]) -> None:
    os.sched_setaffinity(0, share_of_cores(rank, ranks))
    for (some_rows, some_columns), files_of in zip(((rows, columns), (1, 64)), (files[:2], files[2:]), strict=True):
        programs = [
            make_program(rank, ranks, shared, some_rows, some_columns, layers, lines)
            for layers, shared in ((FEW, files_of[0]), (MANY, files_of[1]), (FEW, None), (MANY, None))
        ]
        for program in programs:
            seconds(program, some_rows, 3)
        times = [[seconds(program, some_rows, 1)[0] for program in programs] for _ in range(steps)]
        if rank == 0:
            report(f"{ranks} ranks, {some_rows} x {some_columns} floats", np.array(times).T * 1e6)


def report(what: str, times: np.ndarray) -> None:
    """Print the time of an all-reduce.

    Args:
        times: of each step of the four programs, in microseconds: float64 [4, steps].
    """
    of_layer = []
    for each in (np.median(times, axis=1), times.min(axis=1)):
        few, many, few_alone, many_alone = each
        of_layer.append(((many - few) / (MANY - FEW), (many_alone - few_alone) / (MANY - FEW)))
    (median, without), (best, best_without) = of_layer
    print(
        f"{what}: median {median - without:.1f} us, best {best - best_without:.1f} us; a layer without it takes "
        f"{without:.1f} us"
    )


def connect(address: str, namespaces: list[str]) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection, whose sides are in two namespaces if these are given."""

    def inside(namespace: str | None, make: Callable[[], socket.socket]) -> socket.socket:
        def enter_and_make() -> socket.socket:  # in a thread of its own, which alone enters the namespace
            if namespace is not None:
                with Path(f"/run/netns/{namespace}").open() as file:
                    assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0
            return make()

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(enter_and_make).result()

    here, there = namespaces or (None, None)
    listener = inside(here, lambda: socket.create_server((address, 0)))
    other = inside(there, lambda: socket.create_connection(listener.getsockname()[:2]))
    one, _ = listener.accept()
    for end in (one, other):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, other


def there_and_back(rank: int, line: socket.socket, size: int, times: int = 2000) -> None:
    """Print the time of an exchange of `size` bytes in both directions, one after the other."""
    content, view = bytes(size), memoryview(bytearray(size))

    def receive() -> None:
        missing = size
        while missing:
            with contextlib.suppress(BlockingIOError):  # spins, as ranks do
                missing -= line.recv_into(view[size - missing :], missing, socket.MSG_DONTWAIT)

    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        if rank == 0:
            line.sendall(content)
            receive()
        else:
            receive()
            line.sendall(content)
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        print(
            f"{size} bytes there and back: median {np.median(seconds) * 1e6:.0f} us, best {min(seconds) * 1e6:.0f} us"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tcp", action="store_true", help="two ranks, with TCP between them")
    parser.add_argument("--address", default="127.0.0.1", help="of the first one")
    parser.add_argument("--namespaces", nargs=2, default=[], help="of both, which exist")
    arguments = parser.parse_args()
    ends = connect(arguments.address, arguments.namespaces) if arguments.tcp else ()
    lines = [[-1, ends[0].fileno()], [ends[1].fileno(), -1]] if ends else [[]] * arguments.ranks
    size = arguments.rows * arguments.columns * 4
    files = [share_memory(f"bench-{i}") for i in range(4)]

    def work(rank: int) -> None:
        own = files if not ends or rank == 0 else [share_memory(f"bench-{i}") for i in range(4)]
        run(rank, arguments.ranks, own, arguments.rows, arguments.columns, arguments.steps, lines[rank])
        for each in (1, size) if ends else ():
            there_and_back(rank, ends[rank], each)

    children = []
    for rank in range(1, arguments.ranks):
        if (child := os.fork()) == 0:
            work(rank)
            os._exit(0)
        children.append(child)
    work(0)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
