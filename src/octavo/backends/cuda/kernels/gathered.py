"""Searches among a row's gathered logits (selection.py), by bisection over floats, as on the CPU.

The CPU's is in csrc/kernels/sampler.cpp.
"""

import triton
import triton.language as tl

from .selection import weight_of

SMALL_BLOCK = tl.constexpr(1024)  # gathered logits read at a time


@triton.jit
def kth_largest(x, count, k, BLOCK: tl.constexpr):
    """Return the k-th largest of `count` values, 1 <= k <= count."""
    low, high = keys_of_range(x, count, BLOCK)
    while low < high:
        middle = low + (high - low + 1) // 2
        found = count_above(x, count, value_of(middle), True, BLOCK)
        low = tl.where(found >= k, middle, low)
        high = tl.where(found >= k, high, middle - 1)
    return value_of(low)


@triton.jit
def count_above(x, count, bound, OR_EQUAL: tl.constexpr, BLOCK: tl.constexpr):
    """Return how many of `count` values are above `bound`, or also equal to it."""
    found = 0
    start = 0
    while start < count:
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count, other=float("nan"))
        found += tl.sum(_is_above(value, bound, OR_EQUAL).to(tl.int32), 0)
        start += BLOCK
    return found


@triton.jit
def cutoff_of(x, tokens, count, value, ties, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return the token up to which `ties` tokens have logits equal to `value`; the last one if there are fewer."""
    low = VOCAB - 1
    if _count_equal(x, tokens, count, value, low, BLOCK) > ties:
        high = low
        low = 0
        while low < high:
            middle = (low + high) // 2
            enough = _count_equal(x, tokens, count, value, middle, BLOCK) >= ties
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
    return low


@triton.jit
def _count_equal(x, tokens, count, value, last, BLOCK: tl.constexpr):
    """Return how many of the `count` logits equal `value`, of tokens up to `last`."""
    found = 0
    start = 0
    while start < count:
        at = start + tl.arange(0, BLOCK)
        same = tl.load(x + at, mask=at < count, other=float("nan")) == value
        token = tl.load(tokens + at, mask=at < count, other=0)
        found += tl.sum((same & (token <= last)).to(tl.int32), 0)
        start += BLOCK
    return found


@triton.jit
def weight_above(x, count, bound, largest, scale, OR_EQUAL: tl.constexpr, BLOCK: tl.constexpr):
    """Return the weight of the values above `bound`, or also of those equal to it."""
    total = tl.full((), 0, tl.int64)
    start = 0
    while start < count:
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count, other=float("-inf"))
        kept = _is_above(value, bound, OR_EQUAL) & (at < count)
        total += tl.sum(tl.where(kept, weight_of(value, largest, scale), 0), 0)
        start += BLOCK
    return total


@triton.jit
def _is_above(value, bound, OR_EQUAL: tl.constexpr):
    if OR_EQUAL:
        return value >= bound
    else:
        return value > bound


@triton.jit
def keys_of_range(x, count, BLOCK: tl.constexpr):
    """Return the keys of the smallest and the largest of `count` values."""
    least = float("inf")
    most = float("-inf")
    start = 0
    while start < count:
        at = start + tl.arange(0, BLOCK)
        least = tl.minimum(least, tl.min(tl.load(x + at, mask=at < count, other=float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.load(x + at, mask=at < count, other=float("-inf")), 0))
        start += BLOCK
    return key_of(least).to(tl.int64), key_of(most).to(tl.int64)


@triton.jit
def key_of(x):
    """Map a float to an integer: in the same order, adjacent floats to adjacent integers."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(key):
    """Return the float32 that `key_of` maps to `key`, an int64."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
