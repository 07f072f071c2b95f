"""The KV pool on the device: allocating it, and moving its pages to and from the host beside running steps."""

import threading
from contextlib import AbstractContextManager, nullcontext
from math import prod

import numpy as np
import torch
from torch import Tensor

from octavo.errors import OutOfMemory
from octavo.model.spec import DecoderSpec

from .kernels.rope_and_cache import KvPool
from .memory import memory_of


def bytes_of_page(spec: DecoderSpec, page_size: int, int8: bool) -> int:
    """Return the bytes of a page, all layers together."""
    return KvPool.page_bytes(spec.num_layers, spec.num_kv_heads, page_size, spec.head_dim, int8)


def heads_of_page(content: np.ndarray, spec: DecoderSpec, page_size: int, int8: bool) -> list[np.ndarray]:
    """Return views of a page's bytes by head (see KvPool): uint8 [layers, 2, kv_heads, bytes] of values; of scales."""
    heads = spec.num_layers, 2, spec.num_kv_heads
    values = prod(heads) * page_size * spec.head_dim * (1 if int8 else 2)
    return [part.reshape(*heads, -1) for part in ((content[:values], content[values:]) if int8 else (content,))]


class Pages:
    """The pages of the pool (`pool`). Threads may move different pages at the same time."""

    def __init__(self, spec: DecoderSpec, page_size: int, num_pages: int, int8: bool, device: torch.device):
        """Allocate the pool. Raises OutOfMemory, whose message says how many pages would fit."""
        self.page_bytes, self.num_pages = bytes_of_page(spec, page_size, int8), num_pages
        needed, free = num_pages * self.page_bytes, memory_of(device).free
        if needed > free:
            raise OutOfMemory(
                f"{num_pages} KV pages need {needed / 2**30:.1f} GiB and {device} has {free / 2**30:.1f} GiB free: "
                f"at most {free // self.page_bytes} pages fit; lower kv_cache_memory or gpu_memory_utilization"
            )
        shape = (spec.num_layers, spec.num_kv_heads, page_size, spec.head_dim)
        self.pool = KvPool.allocate(num_pages, *shape, int8, device)
        on_device = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_device else None
        self._copied = torch.cuda.Event() if on_device else None  # the end of the latest `copy`
        self._staged = torch.empty(self.page_bytes, dtype=torch.uint8, pin_memory=on_device)
        self._moving = threading.Lock()  # the stream and the staged page serve one thread at a time

    def export(self, page: int) -> np.ndarray:
        """Return a copy of a page's bytes, after all copies. Raises ValueError."""
        stored = self._page(page)
        with self._moving, self._beside_steps():
            self._await_copies()
            self._staged.copy_(stored, non_blocking=True)
            self._wait()
            content: np.ndarray = self._staged.numpy().copy()
        content.flags.writeable = False
        return content

    def write(self, page: int, content: np.ndarray) -> None:
        """Write a page's bytes, after all copies. Raises ValueError."""
        stored = self._page(page)
        if content.shape != (self.page_bytes,):
            raise ValueError("content must have page_bytes bytes")
        with self._moving, self._beside_steps():
            self._await_copies()
            self._staged.numpy()[:] = content
            stored.copy_(self._staged, non_blocking=True)
            self._wait()

    def copy(self, source: int, target: int) -> None:
        """Copy a page in the order of the current stream. Raises ValueError."""
        self._page(target).copy_(self._page(source))
        if self._copied is not None:
            self._copied.record()

    def _page(self, page: int) -> Tensor:
        """Return a view of a page's bytes. Raises ValueError."""
        if not 0 <= page < self.num_pages:
            raise ValueError("a page is not in the KV pool")
        return self.pool.memory[page]

    def _beside_steps(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _await_copies(self) -> None:
        """Let what follows on the pages' stream wait for the latest copy; if there was none, it is over."""
        if self._stream is not None and self._copied is not None:
            self._stream.wait_event(self._copied)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
