"""A model divided over several processes (tensor parallelism): RankedBackend is rank 0, and leads.

Every rank is a CpuBackend of its own part of the model (model/shard.py). Rank 0 writes each step's batch into memory
that all ranks share; the ranks then run their programs together, and rank 0 samples. The KV pools of all ranks are
shared memory too, so rank 0 exports and imports whole pages without asking the others.

Ranks may be on several nodes (machines): then this is so on each of them, and rank 0 sends batches and pages to the
other nodes (nodes.py, node_main.py).
"""

import contextlib
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.backends.base import ComputesAtOnce, Footprint, Progress, StepBatch, StepResult
from octavo.backends.rank_process import Allocate, Load, Loaded, Members, OnEnd, RankProcess
from octavo.errors import EngineDead, OutOfMemory
from octavo.machine import available_memory, share_of_cores
from octavo.model.shard import Shard, check_size
from octavo.model.spec import DecoderSpec
from octavo.weights.tensor import Parameter

from ._native import stop_ranks
from .backend import CpuBackend, footprint, load_shard
from .program import Place

if TYPE_CHECKING:
    from .node_pages import RemotePages
    from .nodes import Group, RemoteNode

_CAUSE_PATIENCE = 10.0  # seconds until the cause of a broken connection is known


class RankedBackend(ComputesAtOnce):
    """Rank 0 of a model that is divided over several processes: a Backend (see backends.base).

    A page has the same bytes for any number of ranks, 1 included.

    Args:
        shards: the parts of all ranks.
        own: the backend of rank 0.
        others: the other ranks, which have loaded.
        footprint: that of all ranks of this machine together.
    """

    def __init__(self, shards: list[Shard], own: CpuBackend, others: "Ranks", footprint: Footprint):
        self.spec, self.page_size, self.isa, self.arithmetic = own.spec, own.page_size, own.isa, own.arithmetic
        self.footprint = footprint
        self.page_bytes = own.page_bytes // len(shards[0].kv_heads) * own.spec.num_kv_heads
        self._shards, self._own, self._others = shards, own, others
        self._pools: list[np.ndarray] = []  # of the ranks here: uint8 [pages, bytes of the rank's heads]
        self._remote: list[RemotePages] = []  # of the other nodes

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
        head = self.page_bytes // self.spec.num_kv_heads
        sizes = [head * len(shard.kv_heads) for shard in self._shards]
        here = len(self._others.pools)
        self._pools = self._others.map_pools(num_pages, sizes[:here])
        self._remote = [
            node.pages_of(sizes[first : first + here])
            for first, node in zip(range(here, len(sizes), here), self._others.nodes, strict=True)
        ]

    def export_page(self, page: int) -> np.ndarray:
        self._check(page)
        content: np.ndarray = self._pools[0][page]
        if len(self._shards[0].kv_heads) < self.spec.num_kv_heads:  # rank 0 has not all of it
            content = np.empty(self.page_bytes, np.uint8)
            with self._others.connected():
                own = [pool[page] for pool in self._pools] + [part for node in self._remote for part in node.read(page)]
            for pages, part in zip(own, self._parts(content), strict=True):
                part[:] = pages.reshape(part.shape)
        content.flags.writeable = False
        return content

    def import_page(self, page: int, content: np.ndarray) -> None:
        self._check(page)
        if content.size != self.page_bytes:
            raise ValueError("content must have page_bytes bytes")
        parts = [part.reshape(-1) for part in self._parts(content)]
        here = len(self._pools)
        for pool, part in zip(self._pools, parts, strict=False):
            pool[page] = part
        with self._others.connected():
            for i, node in enumerate(self._remote, 1):
                node.write(page, parts[i * here : (i + 1) * here])

    def copy_page(self, source: int, target: int) -> None:
        self._check(source)
        self._check(target)
        for pool in self._pools:
            pool[target] = pool[source]
        with self._others.connected():
            for node in self._remote:
                node.copy(source, target)

    def step(self, batch: StepBatch) -> StepResult:
        return self._own.step(batch)

    def logits(self, batch: StepBatch) -> np.ndarray:
        return self._own.logits(batch)

    def sampling_seconds(self) -> float:
        """Return the seconds spent on sampling so far."""
        return self._own.sampling_seconds()

    def close(self) -> None:
        self._others.end(for_good=self._others.ended is None)
        self._own.close()
        self._pools, self._remote = [], []

    def _check(self, page: int) -> None:
        if not self._pools or not 0 <= page < len(self._pools[0]):
            raise ValueError("a page is not in the KV pool")

    def _parts(self, content: np.ndarray) -> list[np.ndarray]:
        """Return views of a page's content: the heads of each rank, [layers, heads, bytes]."""
        whole = content.reshape(self.spec.num_layers, self.spec.num_kv_heads, -1)
        return [whole[:, shard.kv_heads.start : shard.kv_heads.stop] for shard in self._shards]


class Ranks(Members):
    """Ranks of this machine that are processes of their own, the memory that they share, and the other nodes.

    Raises OSError.

    Args:
        ranks: those of this machine.
        processes: those of them for which processes are started. The first of `ranks` may be in this process.
        lines: sockets to the other nodes, by number; see Place.
        nodes: the other nodes, if they are to be watched here.
        on_end: see Members.

    Attributes:
        pools: file descriptors of the KV pools of `ranks`.
        processes: those that were started.
    """

    def __init__(
        self,
        ranks: range,
        processes: range,
        on_end: OnEnd | None,
        lines: Sequence[int] = (),
        nodes: "Sequence[RemoteNode]" = (),
    ):
        files = self._files = [share_memory(name) for name in ("steps", "calibration")]
        self.pools = [share_memory(f"kv-{rank}") for rank in ranks]
        self._lines = tuple(lines)
        self.processes = [
            RankProcess(
                rank,
                "octavo.backends.cpu.rank_main",
                (*files, self.pools[rank - ranks.start], *(lines if rank == ranks.start else [-1] * len(lines))),
            )
            for rank in processes
        ]
        self.nodes = nodes
        self._stopped, self._lock = threading.Event(), threading.Lock()
        super().__init__([*self.processes, *nodes], on_end)

    def place(self, processors: Iterable[int]) -> Place:
        """Return where the first rank runs, if it is in this process."""
        steps, calibration = self._files
        return Place(steps, calibration, self.pools[0], self._lines, frozenset(processors))

    def wait(self) -> list[Any]:
        """Wait for a message of every process and node; return those of the processes.

        Raises OctavoError if one has failed or ended.
        """
        return super().wait()[: len(self.processes)]

    def map_pools(self, pages: int, sizes: Iterable[int]) -> list[np.ndarray]:
        """Return the KV pools of the ranks: uint8 [pages, bytes]. `sizes`: bytes of a page in each."""
        return [_map(file, pages, size) for file, size in zip(self.pools, sizes, strict=True)]

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Turn the end of a connection to a node into the end of all ranks, once it is known why."""
        try:
            yield
        except OSError:
            self._stopped.wait(_CAUSE_PATIENCE)
            raise EngineDead("the ranks of the engine have been stopped") from None

    def end(self, for_good: bool = False) -> None:
        """End all processes and free the memory, but for what is still mapped; hang up on the other nodes.

        Args:
            for_good: whether the nodes need not wait for another engine.
        """
        if for_good:
            self._ending = True
            for node in self.nodes:
                node.shut_down()
        super().end()
        with self._lock:
            for file in (*self._files, *self.pools):
                os.close(file)
            self._files = []

    def stop_steps(self) -> None:
        with self._lock:
            for file in self._files:
                stop_ranks(file)
        for node in self.nodes:
            for line in (node.sums, node.pages):
                line.hang_up()  # ends whoever waits for it
        self._stopped.set()


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
    group: "Group | None" = None,
    **settings: Any,
) -> RankedBackend:
    """Start the other ranks, or let the other nodes start theirs, and load all parts of a model at the same time.

    Args:
        path: the model's directory or .gguf file, which the other ranks open.
        identity: the age identity that opens it, if it is encrypted.
        hide: whether the other ranks hide their memory, as there are secrets in it.
        on_end: see Members.
        group: the nodes, if there are several; see nodes.py.
        settings: the other arguments of a BackendFactory; `threads` are those of each rank.

    Raises:
        ConfigError, DamagedWeights, OutOfMemory, UnsupportedModel: as load does, of any rank. ConfigError: a node has
            not come.
        EngineDead: A rank has ended.
    """

    def checked_progress(done: int, total: int) -> None:
        ranks.check()
        progress(done, total)

    check_size(spec, size)
    shards = [Shard(spec, rank, size) for rank in range(size)]
    nodes: list[RemoteNode] = []
    if group is not None:
        from .nodes import form  # imported late, as most models are on one machine

        nodes = form(group, size)
    here = range(size // (1 + len(nodes)))
    ranks = Ranks(here, here[1:], on_end, [-1, *(node.sums.fileno() for node in nodes)] if nodes else (), nodes)
    with ranks.loading():
        cores = [sorted(cores_of(rank, len(here))) for rank in here]
        for node in nodes:
            node.load(settings)
        for rank, process in zip(here[1:], ranks.processes, strict=True):
            process.send(Load(str(path), identity, hide, rank, size, cores[rank], settings))
        _check_memory(footprint(spec, parameters, size, 1 + len(nodes), **settings).weight_bytes)
        own = load_shard(shards[0], parameters, ranks.place(cores[0]), progress=checked_progress, **settings)
        loaded = [Loaded(own.weight_bytes, own.page_bytes), *ranks.wait()]
    weights, pages = sum(each.weight_bytes for each in loaded), sum(each.page_bytes for each in loaded)
    return RankedBackend(shards, own, ranks, Footprint(own.isa, weights, pages))


def _check_memory(needed: int) -> None:
    """Raise OutOfMemory if the weights of all ranks here do not fit. (Each rank checks its own, while others load.)"""
    if needed > (available := available_memory()):
        raise OutOfMemory(
            f"the weights of all ranks need {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free; use a "
            "smaller model, or quantization 4bit"
        )


def cores_of(rank: int, size: int) -> set[int]:
    """Return the processors of a rank: its own, or all of them if there are fewer than ranks."""
    available = os.sched_getaffinity(0)
    return share_of_cores(rank, size) if size <= len(available) else available


def _map(file: int, pages: int, page_bytes: int) -> np.ndarray:
    """Return the KV pool of a rank: uint8 [pages, page_bytes]."""
    memory = mmap.mmap(file, max(pages * page_bytes, 1))
    return np.frombuffer(memory, np.uint8, pages * page_bytes).reshape(pages, page_bytes)


def share_memory(name: str) -> int:
    """Return a file descriptor of memory that processes can share. It takes physical memory once it is written."""
    file = os.memfd_create(f"octavo-{name}", os.MFD_CLOEXEC)
    os.ftruncate(file, 1 << 40)
    return file
