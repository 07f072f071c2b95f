"""What the ranks of a model exchange: through NCCL between GPUs, and through gloo in Triton's interpreter.

Libraries only move numbers here. Where these have to be added, each rank does it itself, in the order of
model/spans.py: an all-reduce of a library adds in an order that depends on its algorithm, the number of ranks and the
size.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as distributed
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from octavo.errors import ConfigError

from .kernels.linear import merge

_PATIENCE = timedelta(minutes=30)  # for a rank that still compiles kernels
_LARGE = 1 << 22  # bytes of sums from which more than two ranks divide the rows

_all_gather = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)  # its names in PyTorch


class Group:
    """The ranks of a model, of which this process is one. All call the same methods in the same order.

    Exchanges with NCCL are in the order of the current stream, and can be captured in CUDA graphs.

    Args:
        place: a file by which the ranks find each other.

    Raises ConfigError if this process uses torch.distributed already.
    """

    def __init__(self, rank: int, size: int, place: str, device: torch.device):
        if distributed.is_initialized():
            raise ConfigError(
                "this process uses torch.distributed already, which tensor_parallel_size needs on GPUs; use AsyncLLM "
                "or octavo serve, whose engines are processes of their own"
            )
        self.rank, self.size = rank, size
        on_gpu = device.type == "cuda"
        for library in ("NCCL", "GLOO"):  # all ranks are on this machine: listen to no other
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=FileStore(place, size),
            rank=rank,
            world_size=size,
            timeout=_PATIENCE,
            device_id=device if on_gpu else None,
        )
        self._device = device

    def all_gather(self, x: Tensor) -> Tensor:
        """Return [size, *shape of x]: the tensors `x` of all ranks, which have the same shape."""
        gathered = x.new_empty((self.size, *x.shape))
        if x.numel():
            _all_gather(gathered.view(-1), x.contiguous().view(-1))
        return gathered

    def all_sums(self, x: Tensor) -> Tensor:
        """Return partial sums that `merge` or a norm still has to add, float32 [G, N, M]: those of all ranks' x [N, M].

        Large ones of more than two ranks are added here already (G = 1), each rank adding up some of the rows: then it
        sends its sums once and results once, instead of its sums to every other rank.
        """
        if self.size == 2 or x.nbytes < _LARGE:
            return self.all_gather(x)
        rows, width = x.shape
        share = -(-rows // self.size)
        if rows < share * self.size:
            x = torch.cat([x, x.new_zeros((share * self.size - rows, width))])
        total = x.new_empty((share, width))
        merge(self.exchange(x.view(self.size, share, width)), total, None, None)
        return self.all_gather(total).view(1, -1, width)[:, :rows].contiguous()

    def exchange(self, x: Tensor) -> Tensor:
        """Give x[r] to each rank r. Returns what they have given to this one, [size, ...]."""
        given = torch.empty_like(x)
        distributed.all_to_all_single(given, x.contiguous())
        return given

    def fill(self, x: Tensor) -> None:
        """Fill in `x`, 4-byte numbers, of which each has all bits zero in all ranks but one."""
        if x.numel():
            distributed.all_reduce(x.view(torch.int32))

    def abort(self) -> None:
        """Make exchanges that wait for another rank fail. From any thread."""
        world = distributed.group.WORLD
        if world is not None:
            world._get_backend(self._device).abort()

    def close(self) -> None:
        distributed.destroy_process_group()
