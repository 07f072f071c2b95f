"""Read the 4-bit integers of files on the device: GGUF's Q4_0, Q4_1 and Q4_K, and W4G32 of AWQ and GPTQ.

Layouts of the blocks: GGML's ggml-common.h, and weights/tensor.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.weights.tensor import Parameter, not_finite
from octavo.weights.tensor import Tensor as StoredTensor

from .kernels.four_bits import FourBits, pack

Integers = tuple[Tensor, Tensor, Tensor]
"""q: uint8 [M, K]; scales and minima: float32 [M, K / 32]."""


def read_four_bits(parameter: Parameter, device: torch.device, mixed: bool) -> FourBits:
    """Return a parameter for which `has_four_bits` (weight_bytes.py) on the device.

    Args:
        mixed: the order of bytes (see FourBits).

    Raises DamagedWeights if a scale or minimum is NaN, infinite or too large.
    """
    parts = [_read(part, device) for part in parameter.parts]
    q, scales, minima = (torch.cat(each) if len(each) > 1 else each[0] for each in zip(*parts, strict=True))
    return pack(q, scales, minima, mixed)


def _read(part: StoredTensor, device: torch.device) -> Integers:
    data = torch.from_numpy(part.data.copy()).to(device)
    if part.row_order is not None:
        data = data[torch.from_numpy(part.row_order).to(device)]
    q, scales, minima = _READERS[part.format](data)
    largest = scales.abs() * 15 + minima.abs()
    if not bool(torch.isfinite(largest.to(torch.bfloat16)).all()):
        raise not_finite(part.name)
    return q, scales, minima


def _read_q4_0(data: Tensor) -> Integers:
    blocks = data.view(len(data), -1, 18)
    scales = _floats(blocks[..., :2], torch.float16)
    return _nibbles(blocks[..., 2:]), scales, -8 * scales


def _read_q4_1(data: Tensor) -> Integers:
    blocks = data.view(len(data), -1, 20)
    return (
        _nibbles(blocks[..., 4:]),
        _floats(blocks[..., :2], torch.float16),
        _floats(blocks[..., 2:4], torch.float16),
    )


def _read_w4g32(data: Tensor) -> Integers:
    blocks = data.view(len(data), -1, 24)
    return (
        _nibbles(blocks[..., 8:]),
        _floats(blocks[..., :4], torch.float32),
        _floats(blocks[..., 4:8], torch.float32),
    )


def _read_q4_k(data: Tensor) -> Integers:
    """Read blocks of 256 values in eight groups. Scales and minima have 6 bits, those of groups 4 to 7 in parts."""
    blocks = data.view(len(data), -1, 144)
    low, middle, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat([low & 63, high & 15 | low >> 6 << 4], dim=-1)
    minima = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], dim=-1)
    of_block = _floats(blocks[..., :2], torch.float16)[..., None], _floats(blocks[..., 2:4], torch.float16)[..., None]
    q = blocks[..., 16:].reshape(len(data), -1, 4, 32)
    return (
        torch.cat([q & 15, q >> 4], dim=-1).view(len(data), -1),
        (of_block[0] * scales).view(len(data), -1),
        -(of_block[1] * minima).view(len(data), -1),
    )


def _nibbles(bytes: Tensor) -> Tensor:
    """Return the integers of blocks of 16 bytes, whose low halves are the first 16 values: uint8 [M, K]."""
    return torch.cat([bytes & 15, bytes >> 4], dim=-1).view(len(bytes), -1)


def _floats(bytes: Tensor, type: torch.dtype) -> Tensor:
    """Return the numbers in bytes [M, blocks, size of one]: float32 [M, blocks]."""
    return bytes.contiguous().view(type)[..., 0].float()


_READERS: dict[str, Callable[[Tensor], Integers]] = {
    "Q4_0": _read_q4_0,
    "Q4_1": _read_q4_1,
    "Q4_K": _read_q4_k,
    "W4G32": _read_w4g32,
}
