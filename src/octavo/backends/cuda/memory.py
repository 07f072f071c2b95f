"""The GPU's memory: what it has, what steps take of it, and what is left for the KV pool."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from octavo.backends.base import Footprint
from octavo.errors import OutOfMemory
from octavo.machine import available_memory
from octavo.model.spec import DecoderSpec

from .device import find_device

# What PyTorch does not count: the CUDA context, the kernels' code, the graphs' lists of kernels. An allowance, as it
# cannot be measured before the graphs are captured.
OUTSIDE = 1 << 30
EXCHANGE = 1 << 29  # as much again for NCCL's buffers, if the model is divided
_LEAST_SHARE_STEP = 0.01


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device's memory."""

    total: int
    free: int


class OnDevice(Protocol):
    """A backend whose weights are on devices.

    Attributes:
        memory: of the device that has the least left.
    """

    @property
    def memory(self) -> DeviceMemory: ...


def memory_of(device: torch.device) -> DeviceMemory:
    """Return the memory of a GPU; of the host if Triton's interpreter runs the kernels."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, free)
    return DeviceMemory(available_memory(), available_memory())


def memory_of_setting(name: str) -> DeviceMemory:
    """Return the memory of the device that a setting names. Raises ConfigError if there is none."""
    return memory_of(find_device(name))


def measure_steps(
    eager: Iterable[Callable[[], object]], graphs: Iterable[Callable[[], object]], device: torch.device
) -> int:
    """Run steps, and return the bytes that such steps take beside weights and KV pool.

    CUDA graphs keep memory of their own, all of them together as much as the largest takes.

    Args:
        eager: the steps that take the most memory without a graph.
        graphs: those that take the most in graphs; here they run without.
    """
    return OUTSIDE + _reserved_by(eager, device) + _reserved_by(graphs, device)


def _reserved_by(steps: Iterable[Callable[[], object]], device: torch.device) -> int:
    """Return the bytes by which PyTorch's memory grows while `steps` run, and give them back."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    for step in steps:
        step()
    torch.cuda.synchronize(device)
    grown = torch.cuda.memory_reserved(device) - before
    torch.cuda.empty_cache()
    return grown


def estimated_step_bytes(spec: DecoderSpec, max_batch_tokens: int, max_batch_size: int) -> int:
    """Return about what `measure_steps` will return: for plans, before a model is loaded."""
    row = 16 * spec.hidden_size + 8 * spec.qkv_size + 4 * spec.q_size + 2 * spec.intermediate_size
    return OUTSIDE + 2 * max_batch_tokens * row + 6 * max_batch_size * spec.vocab_size * 4


def kv_bytes(
    memory: DeviceMemory, utilization: float, engines: int, footprint: Footprint, max_batch_tokens: int, loaded: bool
) -> int:
    """Return the bytes that the KV pool of an engine may take.

    Args:
        memory: of the GPU.
        utilization: the share of the GPU's memory that all engines on it may take, with weights and steps.
        engines: how many there are.
        footprint: of each of them.
        max_batch_tokens: for the message.
        loaded: whether the weights are in memory, so that `memory.free` is without them.

    Raises:
        OutOfMemory: nothing is left.
    """
    own = footprint.weight_bytes + footprint.step_bytes
    allowed = int(memory.total * utilization) // engines - own
    available = memory.free - footprint.step_bytes if loaded else memory.free // engines - own
    if min(allowed, available) >= footprint.page_bytes:
        return min(allowed, available)
    parts = f"weights need {_gib(footprint.weight_bytes)} and steps of {max_batch_tokens} tokens "
    parts += _gib(footprint.step_bytes) + (f" in each of {engines} engines" if engines > 1 else "")
    enough = math.ceil((own + footprint.page_bytes) * engines / memory.total / _LEAST_SHARE_STEP) * _LEAST_SHARE_STEP
    smaller = "use a smaller model, quantization 8bit or a smaller max_batch_tokens"
    if allowed >= footprint.page_bytes:
        raise OutOfMemory(
            f"nothing is left for the KV cache: {parts}, and {_gib(memory.free)} of the GPU's {_gib(memory.total)} "
            f"are free; end other programs on it, or {smaller}"
        )
    advice = f"raise gpu_memory_utilization to at least {enough:.2f}, or {smaller}" if enough <= 1 else smaller
    raise OutOfMemory(
        f"nothing is left for the KV cache of {utilization:.0%} of the GPU's {_gib(memory.total)}: {parts}; {advice}"
    )


def _gib(bytes: int) -> str:
    return f"{bytes / 2**30:,.1f} GiB"
