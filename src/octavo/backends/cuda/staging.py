"""Move the arrays of a step to the device in one copy, and its results back in one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 4  # words of 4 bytes: kernels may load 16 bytes at a time
_MOST_VIEWS = 10_000
_SLOTS = 2  # steps whose arrays may be on the way at the same time


@dataclass
class _Slot:
    """A buffer of pinned memory, and when the copy from it has ended."""

    words: Tensor
    host: np.ndarray  # the same memory
    copied: "torch.cuda.Event | None" = None


class Staging:
    """Copies arrays into one buffer on the device, which every step uses again.

    The same names and sizes in the same order come to lie at the same addresses, as CUDA graphs require. An array for
    which the buffer has no room gets memory of its own.
    """

    def __init__(self, capacity: int, device: torch.device):
        """Allocate the buffers: `capacity` words of 4 bytes."""
        self._device, self._capacity, self._next = device, capacity, 0
        self._on_host = device.type != "cuda"
        self._words = torch.empty(capacity, dtype=torch.int32, device=device)
        pinned = (torch.empty(capacity, dtype=torch.int32, pin_memory=not self._on_host) for _ in range(_SLOTS))
        self._slots = [_Slot(words, words.numpy()) for words in pinned]
        self._views: dict[tuple[int, tuple[int, ...], bool], Tensor] = {}

    def send(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Copy `arrays`, of elements of 4 or 8 bytes, to the device, in the order of the current stream.

        Returns:
            by name: a float32 tensor for a float32 array, else an int32 tensor; two words for an element of 8 bytes,
            the low half first. They are overwritten by the next call.
        """
        slot = self._slots[self._next]
        self._next = (self._next + 1) % _SLOTS
        if slot.copied is not None:
            slot.copied.synchronize()
        used, sent = 0, {}
        for name, array in arrays.items():
            words = np.ascontiguousarray(array).view(np.int32)
            end = used + words.size
            if end <= self._capacity:
                slot.host[used:end] = words.ravel()
                sent[name] = self._view(used, words.shape, array.dtype == np.float32)
                used = -(-end // _ALIGNMENT) * _ALIGNMENT
            else:
                tensor = torch.from_numpy(words.copy()).to(self._device)
                sent[name] = tensor.view(torch.float32) if array.dtype == np.float32 else tensor
        used = min(used, self._capacity)
        self._words[:used].copy_(slot.words[:used], non_blocking=True)
        if not self._on_host:
            slot.copied = slot.copied or torch.cuda.Event()
            slot.copied.record()
        return sent

    def _view(self, start: int, shape: tuple[int, ...], is_float: bool) -> Tensor:
        """Return the part of the buffer that begins with word `start`. Steps are alike, so the views are kept."""
        key = (start, shape, is_float)
        if key not in self._views:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            part = self._words[start : start + prod(shape)].view(shape)
            self._views[key] = part.view(torch.float32) if is_float else part
        return self._views[key]


def fetch(words: Tensor) -> Callable[[], np.ndarray]:
    """Start copying an int32 tensor to the host. Returns a function that waits for the copy and returns it."""
    if words.device.type != "cuda":
        return words.numpy
    host = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
    host.copy_(words, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> np.ndarray:
        arrived.synchronize()
        return host.numpy()

    return wait
