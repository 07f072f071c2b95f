"""Matrices of 4-bit integers in groups along k, as GGUF, AWQ and GPTQ files store them. With q [M, K]:

    weight[m, k] = scale[m, k // group] * q[m, k] + minimum[m, k // group]

computed in float32, rounded once, and then to bfloat16. A linear layer unpacks a block of the matrix on its way to the
matrix unit, and so multiplies what a matrix of these bfloat16 values would multiply.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import numbers

GROUPS = (128, 64, 32)  # the sizes of groups that kernels know


@dataclass(frozen=True)
class FourBits:
    """A matrix [M, K] of 4-bit integers; K is a multiple of 64.

    Attributes:
        values: uint8 [M, K / 2]. Byte i of a row has q of k = 2 i in its low half and of k = 2 i + 1 in its high half.
            If `mixed`, byte i = t + 4 j of each block of 32 bytes is at 8 t + j.
        pairs: [K / group, M], the scale in the low half and the minimum in the high half of each: int32 of two float16,
            or int64 of two float32. Kernels fetch both at once, 4 bytes being the least that they can fetch ahead.
        mixed: whether bytes are in the order in which Hopper's matrix instructions take them, 8 bytes to a thread:
            the kernel then copies 16 bytes at a time, as it does in the other order on Ampere.
    """

    values: torch.Tensor
    pairs: torch.Tensor
    mixed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Return (M, K)."""
        return self.values.shape[0], 2 * self.values.shape[1]

    @property
    def group(self) -> int:
        """Return how many k share a scale and a minimum."""
        return self.shape[1] // len(self.pairs)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the matrix."""
        return self.values.nbytes + self.pairs.nbytes


def pack(q: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, mixed: bool) -> FourBits:
    """Return a matrix in the smallest form that keeps every value.

    Args:
        q: uint8 [M, K], from 0 to 15; K is a multiple of 64.
        scales, minima: float32 [M, K / 32].
        mixed: the order of bytes (see FourBits).
    """
    rows, columns = q.shape
    pairs = torch.stack([scales, minima], dim=-1)
    group = next(group for group in GROUPS if _alike(pairs, group))
    pairs = pairs[:, :: group // 32]
    halves = pairs.half()
    pairs = halves.view(torch.int32) if torch.equal(halves.float(), pairs) else pairs.contiguous().view(torch.int64)
    q = q.view(rows, columns // 2, 2)
    values = q[..., 0] | q[..., 1] << 4
    if mixed:
        values = values.view(rows, columns // 64, 8, 4).transpose(2, 3).reshape(rows, columns // 2)
    return FourBits(values, pairs.view(rows, columns // group).T.contiguous(), mixed)


def _alike(pairs: torch.Tensor, group: int) -> bool:
    """Return whether the pairs [M, K / 32, 2] of each `group` of k are equal."""
    each = group // 32
    if pairs.shape[1] % each:
        return False
    of_group = pairs.view(len(pairs), -1, each, 2)
    return torch.equal(of_group, of_group[:, :, :1].expand_as(of_group))


@triton.jit
def unpacked(
    values, pairs, row, block, outputs, K: tl.constexpr, GROUP: tl.constexpr, MIXED: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return weight[row, k] of the BLOCK_K k from `block` * BLOCK_K on: bfloat16 [R, BLOCK_K]."""
    R: tl.constexpr = row.shape[0]
    COUNT: tl.constexpr = (BLOCK_K + GROUP - 1) // GROUP  # groups of a block
    BYTES: tl.constexpr = BLOCK_K // 2
    byte = tl.load(values + row.to(tl.int64)[:, None] * (K // 2) + (block * BYTES + tl.arange(0, BYTES))[None, :])
    if MIXED:
        byte = tl.permute(tl.reshape(byte, (R, 4, BYTES // 4)), (0, 2, 1))
    byte = tl.reshape(byte, (R, COUNT, BYTES // COUNT)).to(tl.int32)
    group = block // (COUNT * GROUP // BLOCK_K) * COUNT + tl.arange(0, COUNT)
    scale, minimum = halves(tl.load(pairs + group.to(tl.int64)[None, :] * outputs + row[:, None]))
    scale, minimum = tl.broadcast_to(scale[:, :, None], byte.shape), tl.broadcast_to(minimum[:, :, None], byte.shape)
    even = tl.fma(scale, numbers.small_integer(byte & 15), minimum)
    odd = tl.fma(scale * 0.0625, numbers.small_integer(byte & 240), minimum)  # without a shift: 16 q, and scale / 16
    return tl.reshape(tl.join(numbers.to_bfloat16(even), numbers.to_bfloat16(odd)), (R, BLOCK_K))


@triton.jit
def halves(pair):
    """Return the low and the high half of int32 or int64 as the floats that they are the bits of, in float32."""
    if pair.dtype == tl.int32:
        low, high = pair.to(tl.int16), (pair >> 16).to(tl.int16)
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
