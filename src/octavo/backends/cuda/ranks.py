"""A model divided over several GPUs (tensor parallelism): RankedBackend is rank 0, and leads.

Every rank is a process with a GPU and a CudaBackend of its part of the model (model/shard.py). Rank 0 sends each step's
batch to the others. All launch the same kernels, which exchange their sums on the GPUs (collectives.py), and sample the
same tokens from the same logits, so that each has the input of the next step; rank 0 alone reads the results.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo.backends.base import Footprint, Progress, StepBatch, StepResult
from octavo.backends.rank_process import Allocate, Join, Joined, Load, Loaded, Member, Members, OnEnd, RankProcess
from octavo.errors import ConfigError, EngineDead, OctavoError
from octavo.machine import share_of_cores
from octavo.model.shard import Shard
from octavo.model.spec import DecoderSpec
from octavo.weights.tensor import Parameter

from .backend import CudaBackend, Pending, load_part, make_part
from .collectives import Group
from .device import devices_of_ranks, find_device
from .first_steps import step_of_every_kind
from .memory import DeviceMemory, memory_of
from .ops import check_ranks
from .rank_messages import Capture, Copy, Read, Step, Stream, ToRank, Write, encode

_BUFFER = 1 << 22  # bytes of a socket's buffer: a step's message fits, so that sending it does not wait
_CAUSE_PATIENCE = 2.0  # seconds until it is known that a rank has ended
_LOOK = 0.1  # seconds between looks whether a rank has ended


@dataclass(frozen=True)
class LedStep:
    """A step that all ranks have launched, for rank 0. `result` may be called once."""

    pending: Pending
    others: "Ranks"

    def result(self) -> StepResult:
        """Wait for the step and return its result. Raises EngineDead if a rank has ended."""
        with self.others.connected():
            return self.pending.result()


class RankedBackend:
    """Rank 0 of a model that is divided over several GPUs: a Backend (see backends.base).

    A page has the same bytes for any number of ranks, 1 included.

    Args:
        shards: the parts of all ranks.
        own: the backend of rank 0.
        others: the other ranks, which have joined.
        footprint: of the GPU that needs the most memory.
        memory: of the GPU that has the least left.
    """

    runs_ahead = True

    def __init__(
        self, shards: list[Shard], own: CudaBackend, others: "Ranks", footprint: Footprint, memory: DeviceMemory
    ):
        self.spec, self.page_size, self.arithmetic = own.spec, own.page_size, own.arithmetic
        self.page_bytes = own.page_bytes // len(shards[0].kv_heads) * own.spec.num_kv_heads
        self.footprint, self.memory = footprint, memory
        self._shards, self._own, self._others = shards, own, others

    def allocate_kv(self, num_pages: int) -> None:
        self._others.send(Allocate(num_pages))
        self._own.allocate_pages(num_pages)
        self._others.wait()
        with self._others.connected():
            self._own.capture_graphs(lambda number: self._others.tell(Capture(number)))
        self.step(step_of_every_kind())

    def export_page(self, page: int) -> np.ndarray:
        own = self._own.export_page(page)
        with self._others.connected():
            others = self._others.ask_pages([Read(page)] * (len(self._shards) - 1))
        whole = np.empty(self.page_bytes, np.uint8)
        contents = [own, *(np.frombuffer(each, np.uint8) for each in others)]
        for shard, content in zip(self._shards, contents, strict=True):
            for target, source in zip(self._heads(whole, shard), self._own.heads_of_page(content), strict=True):
                target[:] = source
        whole.flags.writeable = False
        return whole

    def import_page(self, page: int, content: np.ndarray) -> None:
        if content.shape != (self.page_bytes,):
            raise ValueError("content must have page_bytes bytes")
        own, *others = (b"".join(part.tobytes() for part in self._heads(content, shard)) for shard in self._shards)
        self._own.import_page(page, np.frombuffer(own, np.uint8))
        with self._others.connected():
            self._others.ask_pages([Write(page, each) for each in others])

    def copy_page(self, source: int, target: int) -> None:
        self._own.copy_page(source, target)
        with self._others.connected():
            self._others.ask_steps(Copy(source, target))

    def launch(self, batch: StepBatch) -> LedStep:
        with self._lead(Step(batch)):
            return LedStep(self._own.launch(batch), self._others)

    def step(self, batch: StepBatch) -> StepResult:
        return self.launch(batch).result()

    def logits(self, batch: StepBatch) -> np.ndarray:
        with self._lead(Step(batch, only_logits=True)):
            return self._own.logits(batch)

    def close(self) -> None:
        try:
            if self._own.is_idle:
                self._own.close()
            self._others.stop()  # so that a step that waits for another rank ends
            self._own.close()  # before `end`: NCCL is not freed until the graphs are gone
        finally:
            self._others.end()

    @contextlib.contextmanager
    def _lead(self, step: Step) -> Iterator[None]:
        """Let the other ranks take a step that this one takes in the block. Raises ValueError, as `launch` does."""
        self._own.check(step.batch)
        with self._others.connected():
            self._others.tell(step)
            yield

    def _heads(self, page: np.ndarray, shard: Shard) -> list[np.ndarray]:
        """Return views of a page's content: the heads that a rank has."""
        heads = slice(shard.kv_heads.start, shard.kv_heads.stop)
        return [field[:, :, heads] for field in self._own.heads_of_page(page, self.spec)]


class Ranks(Members):
    """The ranks other than this process, and the sockets to them.

    Raises OSError.

    Attributes:
        group: this process's place among the ranks, once it has joined.
    """

    def __init__(self, size: int, on_end: OnEnd | None):
        self._place = os.fdopen(os.memfd_create("octavo-ranks", os.MFD_CLOEXEC), "rb")  # see Group
        self._steps: list[Stream] = []
        self._pages: list[Stream] = []
        self._asking = threading.Lock()  # one thread at a time asks about pages
        self._stopped, self._problem = threading.Event(), "the engine is closed"
        self._joining: Future[Group] | None = None
        self.group: Group | None = None
        self.processes = [self._start(rank) for rank in range(1, size)]
        super().__init__(self.processes, on_end)

    def _start(self, rank: int) -> RankProcess:
        (steps, their_steps), (pages, their_pages) = socket.socketpair(), socket.socketpair()
        steps.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._steps.append(Stream(steps))
        self._pages.append(Stream(pages))
        with their_steps, their_pages:
            files = their_steps.fileno(), their_pages.fileno(), self._place.fileno()
            return RankProcess(rank, "octavo.backends.cuda.rank_main", files)

    def join(self, device: torch.device) -> Group:
        """Connect this process and the others, and return the group. Raises the error of one that ends meanwhile."""
        joining = self._joining = Future()

        def connect() -> None:
            try:
                joining.set_result(Group(0, len(self.processes) + 1, self._place.fileno(), device))
            except BaseException as error:
                joining.set_exception(error)

        self.send(Join())
        # In another thread, as it waits for all ranks, and cannot be interrupted when one has ended.
        threading.Thread(target=connect, name="octavo-join", daemon=True).start()
        while not wait([joining], _LOOK).done:
            self.check()
        self.group = joining.result()
        self.check()  # of a rank that ended before `stop_steps` knew the group
        return self.group

    def tell(self, message: ToRank) -> None:
        """Send a message to the steps of all ranks."""
        content = encode(message)
        for stream in self._steps:
            stream.send(content)

    def ask_steps(self, message: ToRank) -> None:
        """Send a message to the steps of all ranks, and wait for their answers."""
        self.tell(message)
        for stream in self._steps:
            stream.receive()

    def ask_pages(self, messages: Sequence[ToRank]) -> list[bytearray]:
        """Ask each rank about its pages, and return the answers. From any thread."""
        with self._asking:
            for stream, message in zip(self._pages, messages, strict=True):
                stream.send(encode(message))
            return [stream.receive() for stream in self._pages]

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Turn an error while ranks exchange into the end of all of them: they would wait for each other for ever.

        Raises EngineDead; or the error of a rank that has failed.
        """
        try:
            yield
        except Exception as error:
            if self.first_ended(error) is None and not self._stopped.is_set():
                self._problem, self._ending = str(error), True  # that the others end is no news then
            self.stop_steps()
            raise self._error() from error
        if self._stopped.is_set():  # then what was exchanged last may be wrong
            raise self._error()

    def first_ended(self, error: BaseException) -> Member | None:
        """Return the rank whose end may be the cause of an error, as soon as that is known."""
        if not isinstance(error, OctavoError) and isinstance(error, Exception):
            self._stopped.wait(_CAUSE_PATIENCE)
        return self.ended

    def stop_steps(self) -> None:
        for stream in (*self._steps, *self._pages):
            stream.hang_up()
        self._stopped.set()  # before wrong results can arrive
        if self.group is not None:
            self.group.abort()

    def end(self) -> None:
        super().end()
        for stream in (*self._steps, *self._pages):
            stream.close()
        is_connecting = self._joining is not None and not self._joining.done()
        if not is_connecting and (self.group is None or self.group.close()):
            self._place.close()
        self.group = None

    def _error(self) -> Exception:
        """Return why the ranks have been stopped."""
        ended, why = self.ended, self._problem
        if ended is not None and ended.failed is not None:
            return ended.failed.exception()
        if ended is not None:
            why = f"{ended.name} has ended: {ended.wait()[1]}"
        return EngineDead(f"the ranks of the engine have been stopped: {why}")


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
    device: str,
    **settings: Any,
) -> RankedBackend:
    """Start the other ranks, and load all parts of a model at the same time.

    Args:
        path: the model's directory or .gguf file, which the other ranks open.
        identity: the age identity that opens it, if it is encrypted.
        hide: whether the other ranks hide their memory, as there are secrets in it.
        on_end: see Members.
        device: of the first rank; the others have the next ones.
        settings: the other arguments of a BackendFactory.

    Raises:
        ConfigError, DamagedWeights, OutOfMemory, UnsupportedModel: as load does, of any rank. ConfigError: there are
            not as many GPUs, or they are of different kinds.
        EngineDead: A rank has ended.
    """

    def checked_progress(done: int, total: int) -> None:
        ranks.check()
        progress(done, total)

    check_ranks(spec, size)
    devices = devices_of_ranks(device, size)
    shards = [Shard(spec, rank, size) for rank in range(size)]
    ranks = Ranks(size, on_end)
    with ranks.loading():
        for process in ranks.processes:
            rank_settings = settings | {"device": devices[process.rank]}
            cores = sorted(share_of_cores(process.rank, size))
            process.send(Load(str(path), identity, hide, process.rank, size, cores, rank_settings))
        weights = load_part(shards[0], parameters, device=devices[0], progress=checked_progress, **settings)
        loaded: list[Loaded] = ranks.wait()
        found = find_device(devices[0])
        own = make_part(shards[0], weights, ranks.join(found), alive=lambda: checked_progress(1, 1), **settings)
        joined: list[Joined] = ranks.wait()
        _check_alike(own, joined)
    footprint = replace(
        own.footprint,
        weight_bytes=max(own.footprint.weight_bytes, *(each.weight_bytes for each in loaded)),
        step_bytes=max(own.footprint.step_bytes, *(each.step_bytes for each in joined)),
    )
    memories = [memory_of(found), *(DeviceMemory(each.total, each.free) for each in joined)]
    return RankedBackend(shards, own, ranks, footprint, min(memories, key=lambda memory: memory.free))


def _check_alike(own: CudaBackend, others: Sequence[Joined]) -> None:
    """Raise ConfigError if ranks run other kernels than this one, which may give other bits."""
    for rank, other in enumerate(others, 1):
        if (other.arithmetic, other.kernels) != (own.arithmetic, own.footprint.kernels):
            raise ConfigError(
                f"the GPUs of a model must be of one kind: {own.footprint.kernels} is that of rank 0, {other.kernels} "
                f"that of rank {rank}"
            )
