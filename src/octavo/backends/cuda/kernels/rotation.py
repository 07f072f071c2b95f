"""Rows of int8 with a scale for each span, rotated first (QuaRot: Ashkboos et al., 2024): the CPU's integers.

    y = H x;   scale[n] = max |y[n]| / 127;   q[n] = round(y[n] / scale[n])

of each span of a row by itself, as if it were a row (kernels/linear.py: only the inputs of `out` and `down` have more
than one). So a rank that has some of the spans has the integers of the whole.

H is orthogonal, made of Walsh-Hadamard transforms: of the 64 values of each block, then of value i of the first 2^p
blocks for each i, and if there are more blocks, of the last 2^p (csrc/kernels/rotation.h). Each level takes (a, b) to
(a + b, a - b) and is scaled as there, so the sums are rounded in the same way.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK = 64  # values that are mixed with each other first
_BLOCK = tl.constexpr(BLOCK)


@dataclass(frozen=True)
class Int8Rows:
    """Rotated rows of S equal spans: value [r, k] of span s is values[r, k] * scales[r, s].

    Attributes:
        values: int8 [R, K].
        scales: float32 [R, S].
    """

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def spans(self) -> int:
        """Return S."""
        return self.scales.shape[1]


@triton.jit
def mix(v, STEP: tl.constexpr, FACTOR: tl.constexpr):
    """Take each pair (v[i], v[i + STEP]) to (their sum, their difference) * FACTOR. v: float32 [n]."""
    COUNT: tl.constexpr = v.shape[0] // (2 * STEP)
    pairs = tl.permute(tl.reshape(v, (COUNT, 2, STEP)), (0, 2, 1))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join((a + b) * FACTOR, (a - b) * FACTOR), (0, 2, 1)), (2 * STEP * COUNT,))


@triton.jit
def mix_within_blocks(v):
    """Return H64 / 8 of each block of 64 values of v [n]."""
    v = mix(v, 1, 1.0)
    v = mix(v, 2, 1.0)
    v = mix(v, 4, 1.0)
    v = mix(v, 8, 1.0)
    v = mix(v, 16, 1.0)
    return mix(v, 32, 0.125)


@triton.jit
def mix_across_blocks(v, STEP: tl.constexpr):
    """Return the transform across the blocks of v [n], from distance STEP on; n is a power of two."""
    if v.shape[0] > STEP:
        return mix_across_blocks(mix(v, STEP, 0.70710678118654752), 2 * STEP)
    else:
        return v


@triton.jit
def magnitude(v, known):
    """Return max |v| over the known values as bits, which order NaN above all numbers."""
    return tl.max(tl.where(known, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))


@triton.jit
def to_int8(v, scale, largest, OF_WEIGHT: tl.constexpr):
    """Return v / scale as int8, rounded as the CPU does: to even, or for weights half up."""
    if OF_WEIGHT:
        back = tl.where(scale > 0, tl.div_rn(1.0, scale), 0.0)
        q = tl.minimum(tl.maximum((v + 128.0 * scale) * back + 0.5, 0.0), 255.0)
        return (q.to(tl.int32) - 128).to(tl.int8)
    else:
        back = tl.where(largest > 0, tl.div_rn(127.0, largest), 0.0)
        return ((v * back + 12582912.0) - 12582912.0).to(tl.int32).to(tl.int8)


@triton.jit
def quantize_row(x, values, scales, scratch, n, K: tl.constexpr, MOST: tl.constexpr, OF_WEIGHT: tl.constexpr):
    """values[n], scales[n] = the int8 form of x[n] (see the module).

    MOST is the largest power of two <= K. With MOST < K, `scratch`, float32 [N, K], holds the row between transforms.
    """
    x += n * K
    values += n * K
    i = tl.arange(0, MOST)
    left = mix_across_blocks(mix_within_blocks(tl.load(x + i).to(tl.float32)), _BLOCK)
    if MOST == K:
        bits = magnitude(left, i >= 0)
        right = left
    else:
        REST: tl.constexpr = K - MOST
        scratch += n * K
        tail = mix_within_blocks(tl.load(x + MOST + i, mask=i < REST, other=0.0).to(tl.float32))
        tl.store(scratch + i, left)
        tl.store(scratch + MOST + i, tail, mask=i < REST)
        tl.debug_barrier()
        right = mix_across_blocks(tl.load(scratch + REST + i), _BLOCK)
        bits = tl.maximum(magnitude(left, i < REST), magnitude(right, i >= 0))
    largest = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, 127.0)
    tl.store(scales + n, scale)
    tl.store(values + K - MOST + i, to_int8(right, scale, largest, OF_WEIGHT))
    if MOST < K:
        tl.store(values + i, to_int8(left, scale, largest, OF_WEIGHT), mask=i < K - MOST)


@triton.jit
def quantize_kernel(x, values, scales, scratch, K: tl.constexpr, MOST: tl.constexpr, OF_WEIGHT: tl.constexpr):
    """values[n], scales[n] = the int8 form of x[n]. Program n."""
    quantize_row(x, values, scales, scratch, tl.program_id(0).to(tl.int64), K, MOST, OF_WEIGHT)


def largest_power(width: int) -> int:
    """Return the largest power of two up to a row's width. Raises ValueError if the row can't be rotated."""
    if width % BLOCK:
        raise ValueError(f"int8 rows need a width that is a multiple of {BLOCK}, not {width}")
    return 1 << (width.bit_length() - 1)


def warps(most: int) -> int:
    """Return the number of warps for a row: 8 values a thread, up to 512 threads."""
    return min(max(most // 256, 1), 16)


def new_int8_rows(rows: int, width: int, device: torch.device, spans: int = 1) -> Int8Rows:
    """Return memory for rows of int8."""
    return Int8Rows(
        torch.empty((rows, width), dtype=torch.int8, device=device),
        torch.empty((rows, spans), dtype=torch.float32, device=device),
    )


def quantize_rows(x: torch.Tensor, spans: int = 1, of_weight: bool = False) -> Int8Rows:
    """Return the rows of x, bfloat16 or float32 [N, K], rotated and rounded to int8.

    Args:
        x: contiguous.
        spans: The spans of a row, each of a multiple of 64 values.
        of_weight: Round as the CPU rounds weights, not activations.
    """
    out = new_int8_rows(len(x), x.shape[1], x.device, spans)
    rows, width = len(x) * spans, x.shape[1] // spans
    most = largest_power(width)
    scratch = None if most == width else x.new_empty((rows, width), dtype=torch.float32)
    if rows:
        quantize_kernel[(rows,)](
            x, out.values, out.scales, scratch, width, most, of_weight,
            num_warps=warps(most), enable_fp_fusion=False,
        )  # fmt: skip
    return out
