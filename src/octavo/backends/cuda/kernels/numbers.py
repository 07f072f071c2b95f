"""Arithmetic that is the same on a GPU and in Triton's interpreter, whose bfloat16 is wrong (triton#11584).

The interpreter multiplies the bit patterns of bfloat16 values as integers and truncates when it converts to bfloat16.
"""

import triton
import triton.language as tl

# Kernels see this when they are compiled, so a GPU's code holds nothing of what only the interpreter needs.
INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """Return acc + a b, summed in float32, of a [M, K] bfloat16, b [K, N] bfloat16 and acc [M, N] float32.

    On a GPU, float32 operands would be rounded to TF32, so only the interpreter converts them.
    """
    if INTERPRETING:
        # In float64 the sum over K does not depend on the order that the host's BLAS picks for M rows.
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def to_bfloat16(x):
    """Return x (float32, of any shape) rounded to the nearest bfloat16, ties to even. NaN stays NaN."""
    if INTERPRETING:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        nearest = tl.where(x == x, nearest, 0x7FC00000)
        return nearest.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def widened(x):
    """Return x (bfloat16 or int8, of any shape) as bfloat16, which is exact."""
    if INTERPRETING and x.dtype == tl.int8:
        return x.to(tl.float32).to(tl.bfloat16)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def small_integer(q):
    """Return q (int32, from 0 to 255) as float32, by two operations of full rate instead of a conversion."""
    return (q | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0  # the bits of 2^23 + q


def _interpreted_range(first, end=None, step=1, **_):
    """Return the range whose bounds are tensors of one element; numpy >= 2.4 fails on Triton's own (3.6)."""
    bounds = (0, first, step) if end is None else (first, end, step)
    return range(*(int(b.handle.data.item()) if isinstance(b, tl.tensor) else int(b) for b in bounds))


# Loops of kernels, `for i in steps(first, end, step):`, compile to tl.range, which pipelines loads.
steps = _interpreted_range if INTERPRETING.value else tl.range
