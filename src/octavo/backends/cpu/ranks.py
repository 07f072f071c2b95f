"""A model divided over several processes of one machine (tensor parallelism): RankedBackend is rank 0, and leads.

Every rank is a CpuBackend of its own part of the model (model/shard.py). Rank 0 writes each step's batch into memory
that all ranks share; the ranks then run their programs together, and rank 0 samples. The KV pools of all ranks are
shared memory too, so rank 0 exports and imports whole pages without asking the others.
"""

import mmap
import os
import selectors
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from octavo.backends.base import ComputesAtOnce, Footprint, Progress, StepBatch, StepResult
from octavo.errors import OutOfMemory
from octavo.machine import available_memory, share_of_cores
from octavo.model.shard import Shard, check_size
from octavo.model.spec import DecoderSpec
from octavo.weights.tensor import Parameter

from ._native import stop_ranks
from .backend import CpuBackend, footprint, load_shard
from .program import Place
from .rank_process import Allocate, Load, Loaded, RankProcess, share_memory

OnEnd = Callable[[int, str], None]  # called when a rank has ended by itself: its exit code, and a line about it


class RankedBackend(ComputesAtOnce):
    """Rank 0 of a model that is divided over several processes: a Backend (see backends.base).

    A page has the same bytes for any number of ranks, 1 included.

    Args:
        shards: the parts of all ranks.
        own: the backend of rank 0.
        others: the other ranks, which have loaded.
        footprint: that of all ranks together.
    """

    def __init__(self, shards: list[Shard], own: CpuBackend, others: "Ranks", footprint: Footprint):
        self.spec, self.page_size, self.isa, self.arithmetic = own.spec, own.page_size, own.isa, own.arithmetic
        self.footprint = footprint
        self.page_bytes = own.page_bytes // len(shards[0].kv_heads) * own.spec.num_kv_heads
        self._shards, self._own, self._others = shards, own, others
        self._pools: list[np.ndarray] = []  # uint8 [pages, layers, bytes of the rank's heads]

    def allocate_kv(self, num_pages: int) -> None:
        available = available_memory()
        if num_pages * self.footprint.page_bytes > available:
            raise OutOfMemory(
                f"{num_pages} KV pages need {num_pages * self.footprint.page_bytes / 2**30:.1f} GiB on all ranks and "
                f"{available / 2**30:.1f} GiB are free; lower kv_cache_memory"
            )
        self._others.send(Allocate(num_pages))
        self._own.allocate_kv(num_pages)
        self._others.wait()
        heads = self.page_bytes // self.spec.num_kv_heads
        self._pools = [
            _map(file, num_pages, heads * len(shard.kv_heads)).reshape(num_pages, self.spec.num_layers, -1)
            for file, shard in zip(self._others.pools, self._shards, strict=True)
        ]

    def export_page(self, page: int) -> np.ndarray:
        self._check(page)
        content: np.ndarray = self._pools[0][page].reshape(-1)
        if len(self._shards[0].kv_heads) < self.spec.num_kv_heads:  # rank 0 has not all of it
            content = np.empty(self.page_bytes, np.uint8)
            for pool, part in zip(self._pools, self._parts(content), strict=True):
                part[:] = pool[page].reshape(part.shape)
        content.flags.writeable = False
        return content

    def import_page(self, page: int, content: np.ndarray) -> None:
        self._check(page)
        if content.size != self.page_bytes:
            raise ValueError("content must have page_bytes bytes")
        for pool, part in zip(self._pools, self._parts(content), strict=True):
            pool[page] = part.reshape(pool[page].shape)

    def copy_page(self, source: int, target: int) -> None:
        self._check(source)
        self._check(target)
        for pool in self._pools:
            pool[target] = pool[source]

    def step(self, batch: StepBatch) -> StepResult:
        return self._own.step(batch)

    def logits(self, batch: StepBatch) -> np.ndarray:
        return self._own.logits(batch)

    def sampling_seconds(self) -> float:
        """Return the seconds spent on sampling so far."""
        return self._own.sampling_seconds()

    def close(self) -> None:
        self._others.end()
        self._own.close()
        self._pools = []

    def _check(self, page: int) -> None:
        if not self._pools or not 0 <= page < len(self._pools[0]):
            raise ValueError("a page is not in the KV pool")

    def _parts(self, content: np.ndarray) -> list[np.ndarray]:
        """Return views of a page's content: the heads of each rank, [layers, heads, bytes]."""
        whole = content.reshape(self.spec.num_layers, self.spec.num_kv_heads, -1)
        return [whole[:, shard.kv_heads.start : shard.kv_heads.stop] for shard in self._shards]


class Ranks:
    """The processes of ranks 1 to size - 1, and the memory that all ranks share. Raises OSError.

    Args:
        on_end: called, in another thread, when a rank has ended by itself, before the steps of the others fail. Not if
            it has said that loading failed: then `wait` and `check` raise its error.

    Attributes:
        pools: file descriptors of the KV pools of all ranks.
        processes: those of ranks 1 to size - 1.
        ended: the first of these that has ended by itself.
    """

    def __init__(self, size: int, on_end: OnEnd | None):
        files = self._files = [share_memory(name) for name in ("steps", "calibration")]
        self.pools = [share_memory(f"kv-{rank}") for rank in range(size)]
        self.processes = [RankProcess(rank, (*files, self.pools[rank])) for rank in range(1, size)]
        self.ended: RankProcess | None = None
        self._on_end, self._ending = on_end, False
        self._thread = threading.Thread(target=self._watch, name="octavo-ranks", daemon=True)
        self._thread.start()

    def place(self, processors: Iterable[int]) -> Place:
        """Return where rank 0 runs."""
        steps, calibration = self._files
        return Place(steps, calibration, self.pools[0], frozenset(processors))

    def send(self, message: Allocate) -> None:
        for process in self.processes:
            process.send(message)

    def wait(self) -> list[Any]:
        """Wait for a message of every rank. Raises OctavoError if one has failed or ended."""
        return [process.next() for process in self.processes]

    def check(self) -> None:
        """Raise the error of a rank that has ended while it loaded."""
        if self.ended is not None:
            raise self.ended.error()

    def end(self) -> None:
        """End all processes and free the memory, but for what is still mapped."""
        self._ending = True
        self._stop()
        for process in self.processes:
            process.hang_up()
        self._thread.join()
        for process in self.processes:
            process.end()
        for file in (*self._files, *self.pools):
            os.close(file)

    def _watch(self) -> None:
        """Take in messages, until all ranks have ended."""
        with selectors.DefaultSelector() as selector:
            for process in self.processes:
                selector.register(process.connection, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    if not key.data.take_in():
                        selector.unregister(key.fileobj)
                        self._ended(key.data)

    def _ended(self, process: RankProcess) -> None:
        if self._ending:
            return
        code, how = process.wait()
        self.ended = self.ended or process
        if process.failed is None and self._on_end is not None and not self._ending:
            self._on_end(code, f"rank {process.rank} has ended: {how}")
        self._stop()

    def _stop(self) -> None:
        """Make all ranks return from their steps."""
        for file in self._files:
            stop_ranks(file)


def load_ranks(
    spec: DecoderSpec,
    parameters: Mapping[str, Parameter],
    *,
    size: int,
    path: Path,
    identity: str | None,
    hide: bool,
    on_end: OnEnd | None,
    progress: Progress,
    **settings: Any,
) -> RankedBackend:
    """Start the other ranks, and load all parts of a model at the same time.

    Args:
        path: the model's directory or .gguf file, which the other ranks open.
        identity: the age identity that opens it, if it is encrypted.
        hide: whether the other ranks hide their memory, as there are secrets in it.
        on_end: see Ranks.
        settings: the other arguments of a BackendFactory; `threads` are those of each rank.

    Raises:
        ConfigError, DamagedWeights, OutOfMemory, UnsupportedModel: as load does, of any rank.
        EngineDead: A rank has ended.
    """

    def checked_progress(done: int, total: int) -> None:
        ranks.check()
        progress(done, total)

    check_size(spec, size)
    shards = [Shard(spec, rank, size) for rank in range(size)]
    ranks = Ranks(size, on_end)
    try:
        cores = [sorted(_cores(rank, size)) for rank in range(size)]
        for shard, process in zip(shards[1:], ranks.processes, strict=True):
            process.send(Load(str(path), identity, hide, shard.rank, size, cores[shard.rank], settings))
        _check_memory(footprint(spec, parameters, size, **settings).weight_bytes)
        own = load_shard(shards[0], parameters, ranks.place(cores[0]), progress=checked_progress, **settings)
        loaded = [Loaded(own.weight_bytes, own.page_bytes), *ranks.wait()]
    except BaseException as error:
        ended = ranks.ended
        ranks.end()
        if ended is not None and isinstance(error, Exception):
            raise ended.error() from None  # the first cause: the others fail because one has ended
        raise
    weights, pages = sum(each.weight_bytes for each in loaded), sum(each.page_bytes for each in loaded)
    return RankedBackend(shards, own, ranks, Footprint(own.isa, weights, pages))


def _check_memory(needed: int) -> None:
    """Raise OutOfMemory if the weights of all ranks do not fit. (Each rank checks its own, while others load.)"""
    if needed > (available := available_memory()):
        raise OutOfMemory(
            f"the weights of all ranks need {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free; use a "
            "smaller model, or quantization 4bit"
        )


def _cores(rank: int, size: int) -> set[int]:
    """Return the processors of a rank: its own, or all of them if there are fewer than ranks."""
    available = os.sched_getaffinity(0)
    return share_of_cores(rank, size) if size <= len(available) else available


def _map(file: int, pages: int, page_bytes: int) -> np.ndarray:
    """Return the KV pool of a rank: uint8 [pages, page_bytes]."""
    memory = mmap.mmap(file, max(pages * page_bytes, 1))
    return np.frombuffer(memory, np.uint8, pages * page_bytes).reshape(pages, page_bytes)
