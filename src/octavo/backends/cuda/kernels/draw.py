"""Draw a row's token: in order of token id, the first whose cumulative weight exceeds u times the total.

u is Philox4x32-10 of the row's seed and position, as on the CPU.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from .gathered import (
    SMALL_BLOCK,
    count_above,
    cutoff_of,
    key_of,
    keys_of_range,
    kth_largest,
    value_of,
    weight_above,
)
from .sampling_arrays import DeviceSampling
from .selection import (
    Selection,
    is_finite,
    largest_of,
    least_weight,
    logits_of_chunk,
    options,
    sums_of_chunks,
    weight_of,
)


def draw(selection: Selection, sampling: DeviceSampling, tokens: Tensor) -> None:
    """Write the token of each row, -1 if its logits are not finite: the likeliest, or a random one.

    Args:
        selection: weighed if any row has a temperature above 0.
        tokens: int32 [R or more].
    """
    draw_kernel[(len(selection.logits),)](
        selection.logits,
        *selection.arrays,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.seeds,
        sampling.positions,
        tokens,
        **selection.constants,
        num_warps=8,
        enable_fp_fusion=False,
    )


@triton.jit
def draw_kernel(
    logits,
    maxima,
    firsts,
    sums,
    found,
    values,
    tokens,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    out,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the token of a row: the likeliest, or one drawn among those that top_k, top_p and min_p leave."""
    row = tl.program_id(0)
    largest, best = largest_of(maxima, row, CHUNKS, WIDTH)
    result = tl.load(firsts + row * CHUNKS + best)
    finite = is_finite(largest)
    if (tl.load(temperatures + row) > 0) & finite:
        scale, top_k, top_p, truncated = options(temperatures, top_ks, top_ps, row, VOCAB)
        min_weight = least_weight(tl.load(min_ps + row))
        all_sums = sums + row * CHUNKS
        size = tl.num_programs(0) * CHUNKS
        least = float("-inf")
        cutoff = VOCAB
        if truncated:
            least, cutoff = _truncate(
                all_sums,
                size,
                found + 4 * row,
                values + row.to(tl.int64) * VOCAB,
                tokens + row.to(tl.int64) * VOCAB,
                largest,
                scale,
                top_k,
                top_p,
                min_weight,
                CHUNKS,
                WIDTH,
                VOCAB,
                BLOCK,
            )
        weights = sums_of_chunks(all_sums + 2 * size, CHUNKS, WIDTH)
        total = tl.sum(weights, 0)
        goal = (_uniform(seeds + 2 * row, positions + 2 * row) * total.to(tl.float64)).to(tl.int64)
        goal = tl.minimum(goal, total - 1)
        until = tl.cumsum(weights, 0)
        chosen = tl.minimum(tl.sum((until <= goal).to(tl.int32), 0), CHUNKS - 1)
        before = tl.sum(tl.where(tl.arange(0, WIDTH) < chosen, weights, 0), 0)
        token, x = logits_of_chunk(logits, row, chosen, VOCAB, BLOCK)
        weight = weight_of(x, largest, scale)
        kept = ((x > least) | ((x == least) & (token <= cutoff))) & (weight >= min_weight)
        running = before + tl.cumsum(tl.where(kept, weight, 0), 0)
        result = tl.min(tl.where(running > goal, token, VOCAB - 1), 0)
    tl.store(out + row, tl.where(finite, result, -1))


@triton.jit
def _truncate(
    all_sums,
    size,
    found,
    values,
    tokens,
    largest,
    scale,
    top_k,
    top_p,
    min_weight,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the smallest logit that top_k and top_p leave, and the last token that they leave of those equal to it.

    Adds the weights of the gathered tokens that are left, and that min_p keeps, to those of their chunks.
    """
    SMALL: tl.constexpr = SMALL_BLOCK if BLOCK > SMALL_BLOCK else BLOCK
    gathered = tl.load(found)
    total = tl.sum(sums_of_chunks(all_sums, CHUNKS, WIDTH), 0)
    sure = tl.sum(sums_of_chunks(all_sums + size, CHUNKS, WIDTH), 0)
    least = float("-inf")
    ties = VOCAB
    if top_k < VOCAB:
        wanted = top_k - tl.load(found + 3)
        least = kth_largest(values, gathered, wanted, SMALL)
        ties = wanted - count_above(values, gathered, least, False, SMALL)
        total = sure + weight_above(values, gathered, least, largest, scale, False, SMALL)
        total += ties * weight_of(least, largest, scale)
    if top_p < 1:
        target = top_p.to(tl.float64) * total.to(tl.float64)
        low, high = keys_of_range(values, gathered, SMALL)
        low = tl.maximum(low, key_of(tl.zeros((), tl.float32) + least).to(tl.int64))
        while low < high:
            middle = low + (high - low + 1) // 2
            weight = sure + weight_above(values, gathered, value_of(middle), largest, scale, True, SMALL)
            enough = weight.to(tl.float64) >= target
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        last = value_of(low)
        above = sure + weight_above(values, gathered, last, largest, scale, False, SMALL)
        each = tl.maximum(weight_of(last, largest, scale), 1).to(tl.float64)
        needed = tl.minimum(tl.ceil((target - above.to(tl.float64)) / each), VOCAB * 1.0).to(tl.int32)
        needed = tl.maximum(needed, 1)
        ties = tl.where(last == least, tl.minimum(ties, needed), needed)
        least = last
    cutoff = cutoff_of(values, tokens, gathered, least, ties, VOCAB, SMALL)
    start = 0
    while start < gathered:
        at = start + tl.arange(0, SMALL)
        x = tl.load(values + at, mask=at < gathered, other=float("-inf"))
        token = tl.load(tokens + at, mask=at < gathered, other=0)
        weight = weight_of(x, largest, scale)
        kept = (x > least) | ((x == least) & (token <= cutoff))
        kept = kept & (weight >= min_weight) & (at < gathered)
        tl.atomic_add(all_sums + 2 * size + token // BLOCK, weight, mask=kept)
        start += SMALL
    tl.debug_barrier()
    return least, cutoff


@triton.jit
def _uniform(seed, position):
    """Return the random number in [0, 1), of 53 bits, for the output `position` of a request with `seed`."""
    c0 = tl.load(position).to(tl.uint32, bitcast=True)
    c1 = tl.load(position + 1).to(tl.uint32, bitcast=True)
    k0 = tl.load(seed).to(tl.uint32, bitcast=True)
    k1 = tl.load(seed + 1).to(tl.uint32, bitcast=True)
    zero = c0 * 0
    r0, r1, _r2, _r3 = philox_impl(c0, c1, zero, zero, k0, k1, 10)
    bits = ((r1.to(tl.uint64) << 32) | r0.to(tl.uint64)) >> 11
    return bits.to(tl.float64) * 1.1102230246251565e-16
