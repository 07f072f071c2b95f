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
