"""Ranks of the cuda backend as threads of one process, of which one computes at a time.

Triton's interpreter runs one kernel at a time. The exchanges of octavo.backends.cuda.collectives.Group go through
memory here; those through gloo are tested with real processes.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from octavo.backends.cuda.backend import CudaBackend, load_part, make_part
from octavo.backends.cuda.collectives import Group
from octavo.model.shard import Shard
from octavo.model.spec import DecoderSpec


class Turns:
    """What ranks have given each other, and whose turn it is."""

    def __init__(self, size: int):
        self.barrier, self.computes = threading.Barrier(size, timeout=120), threading.Lock()
        self.given: list[Tensor] = [torch.empty(0)] * size


class TurnsGroup(Group):
    """A Group of threads. What it returns is the same as with gloo."""

    def __init__(self, rank: int, size: int, turns: Turns):
        self.rank, self.size, self._turns = rank, size, turns

    def _give(self, x: Tensor) -> list[Tensor]:
        turns = self._turns
        turns.given[self.rank] = x.clone()
        turns.computes.release()
        try:
            turns.barrier.wait()
            given = [tensor.clone() for tensor in turns.given]
            turns.barrier.wait()
        finally:
            turns.computes.acquire()
        return given

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._give(x))

    def exchange(self, x: Tensor) -> Tensor:
        return torch.stack([given[self.rank] for given in self._give(x)])

    def fill(self, x: Tensor) -> None:
        x.view(torch.int32).copy_(torch.stack([given.view(torch.int32) for given in self._give(x)]).sum(0))


class RanksInTurns:
    """All ranks of a model. Calls go to each of them; the result is that of rank 0, and must be the same in all."""

    def __init__(self, spec: DecoderSpec, parameters: Any, size: int, **settings: Any):
        self._turns = Turns(size)
        self._threads = ThreadPoolExecutor(size)
        groups = [TurnsGroup(rank, size, self._turns) for rank in range(size)]

        def load(group: TurnsGroup) -> CudaBackend:
            shard = Shard(spec, group.rank, size)
            weights = load_part(shard, parameters, progress=lambda done, total: None, **settings)
            return make_part(shard, weights, group, alive=lambda: None, **settings)

        self.ranks = self._each(groups, load)

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """Return what a method returns in each rank."""
        return self._each(self.ranks, lambda rank: getattr(rank, name)(*arguments))

    def close(self) -> None:
        self._threads.shutdown()

    def _each(self, items: list[Any], function: Callable[[Any], Any]) -> list[Any]:
        def in_turn(item: Any) -> Any:
            with self._turns.computes:
                return function(item)

        return [future.result() for future in [self._threads.submit(in_turn, item) for item in items]]
