"""What the ranks of a model exchange: through NCCL between GPUs, and through gloo in Triton's interpreter.

Libraries only move numbers here. Where these have to be added, each rank does it itself, in the order of
model/spans.py: an all-reduce of a library adds in an order that depends on its algorithm, the number of ranks and the
size.
"""

import os
import threading
from datetime import timedelta

import torch
import torch.distributed as distributed
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from octavo.errors import ConfigError, shortened

from .kernels.linear import merge

_PATIENCE = timedelta(minutes=30)  # for a rank that comes late; with NCCL, only when they find each other
_ABORT_PATIENCE = 10.0  # seconds
_LARGE = 1 << 22  # bytes of sums from which more than two ranks divide the rows
_SETTINGS = {
    # All ranks are on this machine: listen to no other.
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    # PyTorch must not end this process, which may be the user's, when a rank ends or an abort takes long: Ranks notices
    # a rank that ends, and the frontend a step that hangs.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}

_all_gather = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)  # its names in PyTorch


class Group:
    """The ranks of a model, of which this process is one. All call the same methods in the same order.

    Exchanges with NCCL are in the order of the current stream, and can be captured in CUDA graphs.

    Args:
        place: file descriptor of an empty memory file that all ranks share, by which they find each other. It must stay
            open until `close` has returned True.

    Raises ConfigError if this process uses torch.distributed already, or the GPUs cannot be connected.
    """

    _is_usable = True  # until PyTorch could not form a group: it would name the next one otherwise than other ranks do

    def __init__(self, rank: int, size: int, place: int, device: torch.device):
        if distributed.is_initialized() or not Group._is_usable:
            raise ConfigError(
                "this process uses torch.distributed already, or has failed to connect ranks before, so it cannot have "
                "tensor_parallel_size on GPUs; use AsyncLLM or octavo serve, whose engines are processes of their own"
            )
        self.rank, self.size = rank, size
        on_gpu = device.type == "cuda"
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        if on_gpu:
            torch.cuda.set_device(device)  # of this thread
        Group._is_usable = False
        try:
            distributed.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=FileStore(f"/proc/self/fd/{place}", size),
                rank=rank,
                world_size=size,
                timeout=_PATIENCE,
                device_id=device if on_gpu else None,
            )
        except RuntimeError as error:
            raise ConfigError(
                f"the GPUs of the ranks cannot be connected; NCCL_DEBUG=WARN tells more: {shortened(error)}"
            ) from error
        Group._is_usable = True
        self._device = device
        self._aborting: threading.Thread | None = None

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
        """Let exchanges that wait for another rank end: with an error, or with wrong results. From any thread.

        Does not wait: NCCL's abort ends when all CUDA graphs with exchanges have been freed.
        """
        world = distributed.group.WORLD
        if self._aborting is None and world is not None:
            backend = world._get_backend(self._device)
            self._aborting = threading.Thread(target=backend.abort, name="octavo-abort", daemon=True)
            self._aborting.start()

    def close(self) -> bool:
        """Leave the group, once the graphs with exchanges are freed. Return whether this has been possible."""
        if self._aborting is not None:
            self._aborting.join(_ABORT_PATIENCE)
            if self._aborting.is_alive():
                return False
        distributed.destroy_process_group()
        return True
