"""The torch backend: describe() run eagerly in plain PyTorch, on CPU or CUDA. Other backends are compared with it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from octavo.backends.base import ComputesAtOnce, Footprint, Progress, StepBatch, StepResult
from octavo.errors import ConfigError, OutOfMemory
from octavo.machine import available_memory
from octavo.model.decoder import describe
from octavo.model.spec import DecoderSpec
from octavo.weights.tensor import Parameter, require_finite

from .ops import KvPool, TorchOps
from .sampling import sample

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TorchBackend(ComputesAtOnce):
    """A Backend (see backends.base) for tests: a row's result may differ in its last bits with the batch."""

    def __init__(self, spec: DecoderSpec, weights: dict[str, torch.Tensor], dtype: torch.dtype, page_size: int):
        self.spec, self.page_size = spec, page_size
        self.arithmetic = f"torch {torch.__version__} {weights['embed'].device} {dtype}"
        self._weights, self._dtype = weights, dtype
        self._page_shape = (spec.num_layers, page_size, spec.num_kv_heads, spec.head_dim)
        self.page_bytes = 2 * math.prod(self._page_shape) * dtype.itemsize
        held = sum(weight.nbytes for weight in weights.values())
        self.footprint = Footprint(f"PyTorch on {weights['embed'].device}", held, self.page_bytes)
        self._pool: KvPool | None = None

    def allocate_kv(self, num_pages: int) -> None:
        device = self._weights["embed"].device
        if num_pages * self.page_bytes > (free := _free_bytes(device)):
            raise OutOfMemory(
                f"{num_pages} KV pages need {num_pages * self.page_bytes / 2**30:.1f} GiB and {device} has "
                f"{free / 2**30:.1f} GiB free: at most {free // self.page_bytes} pages fit; lower kv_cache_memory"
            )
        shape = (num_pages, *self._page_shape)
        keys, values = (torch.zeros(shape, dtype=self._dtype, device=device) for _ in range(2))
        self._pool = KvPool(keys, values)

    @torch.inference_mode()
    def export_page(self, page: int) -> np.ndarray:
        content: np.ndarray = torch.cat(self._halves(page)).cpu().numpy()
        content.flags.writeable = False
        return content

    @torch.inference_mode()
    def import_page(self, page: int, content: np.ndarray) -> None:
        if content.shape != (self.page_bytes,):
            raise ValueError("content must have page_bytes bytes")
        staged = torch.empty(self.page_bytes, dtype=torch.uint8)
        staged.numpy()[:] = content  # PyTorch does not accept read-only arrays
        for half, part in zip(self._halves(page), staged.chunk(2), strict=True):
            half.copy_(part)

    @torch.inference_mode()
    def copy_page(self, source: int, target: int) -> None:
        for into, half in zip(self._halves(target), self._halves(source), strict=True):
            into.copy_(half)

    def _halves(self, page: int) -> list[torch.Tensor]:
        """Return views of the bytes of a page's keys and of its values, uint8 each."""
        assert self._pool is not None, "allocate_kv comes first"
        keys, values = self._pool.keys, self._pool.values
        if not 0 <= page < len(keys):
            raise ValueError("a page is not in the KV pool")
        return [pages[page].view(torch.uint8).view(-1) for pages in (keys, values)]

    def step(self, batch: StepBatch) -> StepResult:
        logits, sums = self._run(batch)
        result = sample(logits, batch.sampling)
        if batch.pooling is None:
            return result
        labels = logits[batch.pooling.label_rows, batch.pooling.label_tokens]
        return replace(result, sums=sums, label_logits=labels)

    def logits(self, batch: StepBatch) -> np.ndarray:
        return self._run(batch)[0]

    @torch.inference_mode()
    def _run(self, batch: StepBatch) -> tuple[np.ndarray, np.ndarray | None]:
        """Compute the forward pass. Return the logits and, with a PoolingBatch, the sums of hidden states."""
        assert self._pool is not None, "allocate_kv comes first"
        ops = TorchOps(self.spec, self._weights, self._dtype, self._pool, batch)
        logits: np.ndarray = describe(self.spec, ops).cpu().numpy()
        return logits, ops.sums

    def close(self) -> None:
        self._weights, self._pool = {}, None


def load(
    spec: DecoderSpec,
    parameters: Mapping[str, Parameter],
    *,
    page_size: int,
    max_batch_tokens: int,
    max_batch_size: int,
    max_model_len: int,
    threads: int,
    dtype: str,
    quantization: str,
    device: str,
    progress: Progress,
    kv_cache_dtype: str = "bf16",
) -> TorchBackend:
    """Load the backend: a BackendFactory (see backends.base).

    Weights are dequantized. The KV cache has the data type of the computation.

    Args:
        dtype: "float32" or "bfloat16"; "auto" is bfloat16.
        quantization: "auto" or "none".
        device: the name of a PyTorch device; "auto" is cpu.

    Raises:
        ConfigError, OutOfMemory
    """
    torch_device, torch_dtype = _device(device), _dtype(dtype)
    torch.set_num_threads(threads)
    total = sum(part.nbytes for parameter in parameters.values() for part in parameter.parts)
    done, weights = 0, {}
    for name, parameter in parameters.items():
        try:
            stacked = np.concatenate([require_finite(part.name, part.float32()) for part in parameter.parts])
            weights[name] = torch.from_numpy(stacked).to(torch_dtype).to(torch_device)
        except (torch.OutOfMemoryError, MemoryError):
            raise OutOfMemory(f"the weights do not fit in the memory of {torch_device}; use a smaller model") from None
        for part in parameter.parts:
            part.release()
            done += part.nbytes
        progress(done, total)
    return TorchBackend(spec, weights, torch_dtype, page_size)


def footprint(
    spec: DecoderSpec, parameters: Mapping[str, Parameter], *, page_size: int, dtype: str, device: str, **_: Any
) -> Footprint:
    """Return the footprint of the backend that `load` would return, without reading weights. Raises ConfigError."""
    item = _dtype(dtype).itemsize
    weights = sum(math.prod(parameter.shape) for parameter in parameters.values())
    page = 2 * spec.num_layers * page_size * spec.kv_size
    return Footprint(f"PyTorch on {_device(device)}", weights * item, page * item)


def _device(name: str) -> torch.device:
    """Return the device that a setting names. Raises ConfigError if PyTorch cannot use it."""
    device = torch.device("cpu" if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name} is not available to PyTorch; use device cpu, or install PyTorch for CUDA")
    return device


def _dtype(name: str) -> torch.dtype:
    return _DTYPES["bfloat16" if name == "auto" else name]


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
