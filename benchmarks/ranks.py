"""The speed of several ranks of one thread each against as many threads of one process: python benchmarks/ranks.py

Both are loaded at the same time and take decode steps by turns, so that other load on the machine affects both alike.
Prints tokens per second, by the median and by the fastest step, and their ratio. On a busy machine, a rank that waits
for a processor delays the others, as a thread does; only the fastest steps are comparable then.

    python benchmarks/ranks.py --model smollm2 --ranks 2 --streams 1,8,64

With --nnodes, ranks are on several machines: start the other ones first, with octavo serve --node-rank 1 and so on.
"""

import argparse
import time
from typing import Any

import numpy as np

from octavo.backends.base import Backend, SamplingBatch, StepBatch
from octavo.backends.cpu import load
from octavo.backends.cpu.nodes import Group
from octavo.backends.cpu.ranks import load_ranks
from octavo.config import EngineConfig
from octavo.model import describe_model
from octavo.weights import fingerprint, open_checkpoint, resolve

PAGE_SIZE, CONTEXT, PAGES = 32, 200, 512  # a context that begins no block, which costs more


def step_batch(streams: int) -> StepBatch:
    """Return a batch of one token at position CONTEXT of each of some streams."""
    pages = CONTEXT // PAGE_SIZE + 1
    return StepBatch(
        tokens=np.random.default_rng(0).integers(10, 400, streams).astype(np.int32),
        positions=np.full(streams, CONTEXT, np.int32),
        query_start=np.arange(streams + 1, dtype=np.int32),
        page_tables=np.arange(streams * pages, dtype=np.int32).reshape(streams, pages),
        sample_rows=np.arange(streams, dtype=np.int32),
        sampling=SamplingBatch.greedy(streams),
    )


def seconds(backend: Backend, batch: StepBatch) -> float:
    began = time.perf_counter()
    backend.step(batch)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--streams", default="1,8,64")
    parser.add_argument("--seconds", type=float, default=15, help="for each number of streams")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--master-addr", default="127.0.0.1")
    parser.add_argument("--secret-file")
    arguments = parser.parse_args()
    path = resolve(arguments.model)
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    settings: dict[str, Any] = {
        "page_size": PAGE_SIZE, "max_batch_tokens": 512, "max_batch_size": 256, "max_model_len": 1024,
        "dtype": "auto", "quantization": arguments.quantization, "device": "auto", "kv_cache_dtype": "bf16",
        "progress": lambda done, total: None,
    }  # fmt: skip
    group = None
    if arguments.nnodes > 1:
        config = EngineConfig(
            model=arguments.model, tensor_parallel_size=arguments.ranks, nnodes=arguments.nnodes,
            master_addr=arguments.master_addr, secret_file=arguments.secret_file,
        )  # fmt: skip
        group = Group.of(config, config.read_secrets(), fingerprint(checkpoint))
    alone = load(spec, parameters, threads=arguments.ranks, **settings)
    ranks = load_ranks(
        spec, parameters, size=arguments.ranks, path=path, identity=None, hide=False, on_end=None, threads=1,
        group=group, **settings,
    )  # fmt: skip
    for backend in (alone, ranks):
        backend.allocate_kv(PAGES)
        for page in range(PAGES):  # memory that nobody has written is a single page of zeros, and always in the caches
            backend.import_page(page, np.zeros(backend.page_bytes, np.uint8))
        seconds(backend, step_batch(1))
    for streams in map(int, arguments.streams.split(",")):
        batch, times, began = step_batch(streams), [], time.monotonic()
        while time.monotonic() - began < arguments.seconds or len(times) < 5:
            times.append([seconds(backend, batch) for backend in (alone, ranks)])
        one, several = streams / np.median(times, axis=0)
        one_best, several_best = streams / np.min(times, axis=0)
        print(
            f"{streams} streams: 1 x {arguments.ranks} threads {one:,.0f} tokens/s (best {one_best:,.0f}), "
            f"{arguments.ranks} x 1 {several:,.0f} (best {several_best:,.0f}): "
            f"{several / one:.0%} (best {several_best / one_best:.0%}), {len(times)} steps each",
            flush=True,
        )
    ranks.close()


if __name__ == "__main__":
    main()
