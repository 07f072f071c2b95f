"""Ranks of the cuda backend as threads of one process, of which one computes at a time, on one device.

So the bits of a divided model can be compared where there is one GPU, or Triton's interpreter, which runs one kernel at
a time. Exchanges go through memory here, instead of NCCL or gloo.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from octavo.backends.cuda.backend import CudaBackend, load_part
from octavo.backends.cuda.collectives import Group
from octavo.model.shard import Shard
from octavo.model.spec import DecoderSpec
from octavo.weights.tensor import Parameter


class Turns:
    """What ranks have given each other, and whose turn it is."""

    def __init__(self, size: int):
        self.barrier, self.computes = threading.Barrier(size, timeout=120), threading.Lock()
        self.given: list[Tensor] = [torch.empty(0)] * size


class TurnsGroup(Group):
    """A Group of threads."""

    def __init__(self, rank: int, size: int, turns: Turns):
        self.rank, self.size, self._turns = rank, size, turns

    def _give(self, x: Tensor) -> list[Tensor]:
        turns = self._turns
        turns.given[self.rank] = _computed(x.clone())
        turns.computes.release()
        try:
            turns.barrier.wait()
            given = [_computed(tensor.clone()) for tensor in turns.given]
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
    """All ranks of a model, without CUDA graphs. Calls go to each of them.

    Args:
        settings: the arguments of a BackendFactory.
    """

    def __init__(self, spec: DecoderSpec, parameters: Mapping[str, Parameter], size: int, **settings: Any):
        self._turns = Turns(size)
        self._threads = ThreadPoolExecutor(size)
        sizes = {name: settings[name] for name in ("page_size", "max_batch_tokens", "max_batch_size", "max_model_len")}
        int8_kv = settings["kv_cache_dtype"] == "int8"

        def load(group: TurnsGroup) -> CudaBackend:
            shard = Shard(spec, group.rank, size)
            weights = load_part(shard, parameters, progress=lambda done, total: None, **settings)
            made = CudaBackend(shard, weights, **sizes, int8_kv=int8_kv, group=group)
            made._graphs = None
            return made

        self.ranks = self._in_turns([TurnsGroup(rank, size, self._turns) for rank in range(size)], load)

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """Return what a method returns in each rank."""
        return self.each(lambda rank: getattr(rank, name)(*arguments))

    def each(self, function: Callable[[CudaBackend], Any]) -> list[Any]:
        """Return what a function returns for each rank. It may call methods of the backend."""
        return self._in_turns(self.ranks, function)

    def close(self) -> None:
        self.call("close")
        self._threads.shutdown()

    def _in_turns(self, items: list[Any], function: Callable[[Any], Any]) -> list[Any]:
        def in_turn(item: Any) -> Any:
            with self._turns.computes:
                return function(item)

        return [future.result() for future in [self._threads.submit(in_turn, item) for item in items]]


def _computed(x: Tensor) -> Tensor:
    """Wait until x is computed, for use on other streams."""
    if x.device.type == "cuda":
        torch.cuda.current_stream(x.device).synchronize()
    return x
