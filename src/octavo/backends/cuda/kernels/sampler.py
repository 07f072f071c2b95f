"""Sampling on the device: what SamplingBatch (backends/base.py) describes, one program a row.

A row's logits are read a few times in blocks of a fixed size, always in the same order, so its token depends on the row
only. Truncation does not sort: bisection over floats finds the smallest logit that remains, as on the CPU
(csrc/kernels/sampler.cpp). A draw takes, in order of token id, the first token whose cumulative weight exceeds u times
the total, where u is Philox4x32-10 of the row's seed and position.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from octavo.backends.base import SamplingBatch, StepResult

_BLOCK = 8192  # logits a program reads at a time
_SEEN = tl.constexpr(1 << 30)  # a bit of a token's count: it is in the history; the bits below count it in the output
_LOG2E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@dataclass(frozen=True)
class DeviceSampling:
    """The arrays of a SamplingBatch on the device. Integers of 64 bits are pairs of int32, low half first."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    num_logprobs: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    history: Tensor
    history_start: Tensor
    history_outputs: Tensor
    bias_tokens: Tensor
    bias_values: Tensor
    bias_start: Tensor
    masks: Tensor
    mask_start: Tensor


@dataclass(frozen=True)
class Sampled:
    """The device's part of a StepResult, packed in one int32 tensor of R * (3 + 2 K) words.

    In this order: tokens [R], logprobs [R], ranks [R], top_tokens [R, K], top_logprobs [R, K]; the likeliest tokens of
    a row are in order of token id. The logprobs are the bits of float32 values.
    """

    words: Tensor
    rows: int
    columns: int
    wants_logprobs: bool

    def result(self, words: np.ndarray) -> StepResult:
        """Return the StepResult of `words`, which are this tensor's on the host."""
        rows, columns = self.rows, self.columns
        tokens, logprobs, ranks = words[: 3 * rows].reshape(3, rows)
        if not self.wants_logprobs:
            return StepResult(tokens.copy())
        top_tokens, top_logprobs = words[3 * rows :].reshape(2, rows, columns)
        values = top_logprobs.view(np.float32)
        order = np.lexsort((top_tokens, -values)) if columns else np.zeros((rows, 0), np.int64)  # NaN comes last
        return StepResult(
            tokens.copy(),
            logprobs.view(np.float32).copy(),
            ranks.copy(),
            np.take_along_axis(top_tokens, order, axis=1),
            np.take_along_axis(values, order, axis=1),
        )


def sample(logits: Tensor, sampling: DeviceSampling, batch: SamplingBatch) -> Sampled:
    """Sample the next token of each row.

    Args:
        logits: float32 [R, vocab], raw.
        sampling: the arrays of `batch` on the device.
    """
    rows, vocab = logits.shape
    most = int(batch.num_logprobs.max(initial=-1))
    columns = min(max(most, 0), vocab)
    words = torch.empty(rows * (3 + 2 * columns), dtype=torch.int32, device=logits.device)
    sampled = Sampled(words, rows, columns, most >= 0)
    if not rows:
        return sampled
    floats = words.view(torch.float32)
    top = 3 * rows
    if columns:
        words[top : top + rows * columns].fill_(-1)
        floats[top + rows * columns :].fill_(torch.nan)
    _sample_row[(rows,)](
        logits,
        _adjusted(logits, sampling, batch),
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.seeds,
        sampling.positions,
        sampling.num_logprobs,
        words,
        floats[rows:],
        words[2 * rows :],
        words[top:],
        floats[top + rows * columns :],
        columns,
        VOCAB=vocab,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)),
        num_warps=16,
        enable_fp_fusion=False,
    )
    return sampled


def _adjusted(logits: Tensor, sampling: DeviceSampling, batch: SamplingBatch) -> Tensor:
    """Return the logits with biases, penalties and masks applied: `logits` itself if no row has any."""
    if not (len(batch.history) or len(batch.bias_tokens) or len(batch.masks)):
        return logits
    rows, vocab = logits.shape
    adjusted = logits.clone()
    if len(batch.bias_tokens):
        _add_biases[(rows,)](
            adjusted, sampling.bias_tokens, sampling.bias_values, sampling.bias_start, vocab, BLOCK=128
        )
    blocks = triton.cdiv(vocab, 1024)
    if len(batch.history):
        lengths = np.diff(batch.history_start)
        counts = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
        history = (sampling.history, sampling.history_start, sampling.history_outputs)
        _count_history[(rows, triton.cdiv(int(lengths.max()), 1024))](counts, *history, vocab, BLOCK=1024)
        penalties = (sampling.repetition, sampling.presence, sampling.frequency)
        _penalize[(rows, blocks)](
            adjusted, counts, sampling.history_start, *penalties, vocab, BLOCK=1024, enable_fp_fusion=False
        )
    if len(batch.masks):
        _mask[(rows, blocks)](adjusted, sampling.masks, sampling.mask_start, vocab, BLOCK=1024)
    return adjusted


@triton.jit
def _add_biases(logits, tokens, values, starts, vocab, BLOCK: tl.constexpr):
    """Add each row's biases. A token may occur twice only if one of its values is -inf, so their order is all one."""
    row = tl.program_id(0)
    at = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    while at < end:
        entry = at + tl.arange(0, BLOCK)
        token = tl.load(tokens + entry, mask=entry < end, other=-1)
        value = tl.load(values + entry, mask=entry < end, other=0.0)
        exists = (token >= 0) & (token < vocab)
        tl.atomic_add(logits + row.to(tl.int64) * vocab + token, value, mask=exists)
        at += BLOCK


@triton.jit
def _count_history(counts, history, starts, outputs, vocab, BLOCK: tl.constexpr):
    """Mark the tokens of each row's history, and count those of its output."""
    row = tl.program_id(0)
    end = tl.load(starts + row + 1)
    first_output = end - tl.load(outputs + row)
    entry = tl.load(starts + row) + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(history + entry, mask=entry < end, other=-1)
    exists = (token >= 0) & (token < vocab)
    count = counts + row.to(tl.int64) * vocab + token
    tl.atomic_or(count, tl.full((BLOCK,), _SEEN, tl.int32), mask=exists)
    tl.atomic_add(count, tl.full((BLOCK,), 1, tl.int32), mask=exists & (entry >= first_output))


@triton.jit
def _penalize(logits, counts, starts, repetitions, presences, frequencies, vocab, BLOCK: tl.constexpr):
    """Apply the penalties of repetition, frequency and presence as vLLM defines them."""
    row = tl.program_id(0)
    if tl.load(starts + row + 1) > tl.load(starts + row):
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = row.to(tl.int64) * vocab + token
        x = tl.load(logits + at, mask=token < vocab, other=0.0)
        count = tl.load(counts + at, mask=token < vocab, other=0)
        outputs = count & (_SEEN - 1)
        repetition = tl.load(repetitions + row)
        y = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition)
        y -= tl.load(frequencies + row) * outputs.to(tl.float32)
        y = tl.where(outputs > 0, y - tl.load(presences + row), y)
        tl.store(logits + at, y, mask=(token < vocab) & (count > 0))


@triton.jit
def _mask(logits, masks, starts, vocab, BLOCK: tl.constexpr):
    """Ban the tokens that a row's mask does not allow. NaN and +inf stay, so that the row still fails."""
    row = tl.program_id(0)
    start = tl.load(starts + row)
    words = tl.load(starts + row + 1) - start
    if words > 0:
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = logits + row.to(tl.int64) * vocab + token
        word = tl.load(masks + start + token // 32, mask=token // 32 < words, other=0)
        banned = ((word >> (token % 32)) & 1) == 0
        x = tl.load(at, mask=token < vocab, other=float("nan"))
        tl.store(at, tl.full((BLOCK,), float("-inf"), tl.float32), mask=(token < vocab) & banned & (x < float("inf")))


@triton.jit(
    do_not_specialize=["columns"],
    do_not_specialize_on_alignment=["tokens", "logprobs", "ranks", "top_tokens", "top_logprobs"],
)
def _sample_row(
    raw,
    adjusted,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    nums_logprobs,
    tokens,
    logprobs,
    ranks,
    top_tokens,
    top_logprobs,
    columns,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sample a row; write its token, logprob, rank and likeliest tokens. See Sampled."""
    row = tl.program_id(0)
    raw += row.to(tl.int64) * VOCAB
    adjusted += row.to(tl.int64) * VOCAB
    largest, token, damaged = _maximum(adjusted, VOCAB, BLOCK)
    failed = damaged | (largest == float("-inf"))
    temperature = tl.load(temperatures + row)
    if (temperature > 0) & (not failed):
        scale = tl.minimum(_LOG2E / temperature, _LARGEST)
        top_k = tl.load(top_ks + row)
        token = _draw(
            adjusted,
            largest,
            scale,
            tl.where((top_k > 0) & (top_k < VOCAB), top_k, VOCAB),
            tl.load(top_ps + row),
            tl.load(min_ps + row),
            _uniform(seeds + 2 * row, positions + 2 * row),
            VOCAB,
            BLOCK,
        )
    token = tl.where(failed, -1, token)
    tl.store(tokens + row, token)
    wanted = tl.load(nums_logprobs + row)
    logprob = float("nan")
    rank = 0
    if (wanted >= 0) & (not failed):
        most, _, _ = _maximum(raw, VOCAB, BLOCK)
        total = _weight_above(raw, float("-inf"), most, _LOG2E, VOCAB, BLOCK)
        log_total = most.to(tl.float64) + tl.log(total)
        x = tl.load(raw + token)
        logprob = (x.to(tl.float64) - log_total).to(tl.float32)
        rank = 1 + _rank(raw, x, token, VOCAB, BLOCK)
        if wanted > 0:
            at = row.to(tl.int64) * columns
            _write_likeliest(raw, most, wanted, log_total, top_tokens + at, top_logprobs + at, VOCAB, BLOCK)
    tl.store(logprobs + row, logprob)
    tl.store(ranks + row, rank)


@triton.jit
def _draw(x, largest, scale, top_k, top_p, min_p, u, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return the token drawn among those that top_k, top_p and min_p leave, for the random number `u`.

    Those are the logits above `least`, and the first `ties` of those equal to it, if they weigh at least `min_p`.
    """
    least = float("-inf")
    ties = VOCAB
    if top_k < VOCAB:
        least = _kth_largest(x, largest, top_k, VOCAB, BLOCK)
        ties = top_k - _count_above(x, least, VOCAB, BLOCK)
    if top_p < 1:
        target = top_p.to(tl.float64) * _weight_kept(x, least, ties, 0.0, largest, scale, VOCAB, BLOCK)
        low = _key(least).to(tl.int64)
        high = _key(largest).to(tl.int64)
        while low < high:
            middle = low + (high - low + 1) // 2
            enough = _weight_from(x, _value(middle), largest, scale, VOCAB, BLOCK) >= target
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        last = _value(low)
        above = _weight_above(x, last, largest, scale, VOCAB, BLOCK)
        weight = tl.exp2((last - largest) * scale).to(tl.float64)
        needed = tl.minimum(tl.ceil((target - above) / weight), VOCAB).to(tl.int32)
        needed = tl.maximum(needed, 1)
        ties = tl.where(last == least, tl.minimum(ties, needed), needed)
        least = last
    rest = u * _weight_kept(x, least, ties, min_p, largest, scale, VOCAB, BLOCK)
    chosen = 0
    equal = 0
    found = False
    for start in range(0, VOCAB, BLOCK):
        if not found:
            weights, equal = _kept(x, start, least, ties, equal, min_p, largest, scale, VOCAB, BLOCK)
            total = tl.sum(weights, 0).to(tl.float64)
            offset = tl.arange(0, BLOCK)
            found = rest < total
            if found:
                running = tl.cumsum(weights.to(tl.float64), 0)
                last_kept = tl.max(tl.where(weights > 0, offset, 0), 0)
                chosen = start + tl.minimum(tl.min(tl.where(running > rest, offset, BLOCK), 0), last_kept)
            elif total > 0:
                chosen = start + tl.max(tl.where(weights > 0, offset, 0), 0)  # if rounding leaves a rest at the end
            rest -= total
    return chosen


@triton.jit
def _kept(x, start, least, ties, equal, min_p, largest, scale, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return the weights of a block, 0 where a token is not kept, and how many equal `least` up to its end."""
    offset = start + tl.arange(0, BLOCK)
    value = tl.load(x + offset, mask=offset < VOCAB, other=float("-inf"))
    weights = tl.exp2((value - largest) * scale)
    is_equal = ((value == least) & (offset < VOCAB)).to(tl.int32)
    place = equal + tl.cumsum(is_equal, 0)
    kept = (value > least) | ((is_equal > 0) & (place <= ties))
    return tl.where(kept & (weights >= min_p), weights, 0.0), equal + tl.sum(is_equal, 0)


@triton.jit
def _weight_kept(x, least, ties, min_p, largest, scale, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.full((), 0.0, tl.float64)
    equal = 0
    for start in range(0, VOCAB, BLOCK):
        weights, equal = _kept(x, start, least, ties, equal, min_p, largest, scale, VOCAB, BLOCK)
        total += tl.sum(weights, 0).to(tl.float64)
    return total


@triton.jit
def _weight_from(x, least, largest, scale, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return the weight of all logits of at least `least`."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, VOCAB, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        value = tl.load(x + offset, mask=offset < VOCAB, other=float("-inf"))
        total += tl.sum(tl.where(value >= least, tl.exp2((value - largest) * scale), 0.0), 0).to(tl.float64)
    return total


@triton.jit
def _weight_above(x, bound, largest, scale, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return the weight of all logits above `bound`."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, VOCAB, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        value = tl.load(x + offset, mask=offset < VOCAB, other=float("-inf"))
        total += tl.sum(tl.where(value > bound, tl.exp2((value - largest) * scale), 0.0), 0).to(tl.float64)
    return total


@triton.jit
def _kth_largest(x, largest, k, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return the k-th largest logit, 1 <= k <= VOCAB."""
    low = _key(tl.full((), float("-inf"), tl.float32)).to(tl.int64)
    high = _key(largest).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        bound = _value(middle)
        count = 0
        for start in range(0, VOCAB, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            value = tl.load(x + offset, mask=offset < VOCAB, other=float("-inf"))
            count += tl.sum((value >= bound).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle - 1)
    return _value(low)


@triton.jit
def _count_above(x, bound, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    count = 0
    for start in range(0, VOCAB, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        value = tl.load(x + offset, mask=offset < VOCAB, other=float("-inf"))
        count += tl.sum((value > bound).to(tl.int32), 0)
    return count


@triton.jit
def _rank(x, value, token, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return how many tokens are likelier than `token`; of equal logits, the lower token id is."""
    count = 0
    for start in range(0, VOCAB, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        other = tl.load(x + offset, mask=offset < VOCAB, other=float("-inf"))
        count += tl.sum(((other > value) | ((other == value) & (offset < token))).to(tl.int32), 0)
    return count


@triton.jit
def _write_likeliest(x, largest, wanted, log_total, tokens, logprobs, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Write the `wanted` likeliest tokens and their logprobs, in order of token id."""
    wanted = tl.minimum(wanted, VOCAB)
    least = _kth_largest(x, largest, wanted, VOCAB, BLOCK)
    ties = wanted - _count_above(x, least, VOCAB, BLOCK)
    written = 0
    equal = 0
    for start in range(0, VOCAB, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        value = tl.load(x + offset, mask=offset < VOCAB, other=float("-inf"))
        is_equal = ((value == least) & (offset < VOCAB)).to(tl.int32)
        place = equal + tl.cumsum(is_equal, 0)
        kept = ((value > least) | ((is_equal > 0) & (place <= ties))).to(tl.int32)
        at = written + tl.cumsum(kept, 0) - 1
        tl.store(tokens + at, offset, mask=kept > 0)
        tl.store(logprobs + at, (value.to(tl.float64) - log_total).to(tl.float32), mask=kept > 0)
        written += tl.sum(kept, 0)
        equal += tl.sum(is_equal, 0)


@triton.jit
def _maximum(x, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest logit, the first token that has it, and whether a logit is NaN or +inf."""
    largest = tl.full((), float("-inf"), tl.float32)
    token = 0
    damaged = 0
    for start in range(0, VOCAB, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        value = tl.load(x + offset, mask=offset < VOCAB, other=float("-inf"))
        good = value < float("inf")
        damaged += tl.sum((good == 0).to(tl.int32), 0)
        value = tl.where(good, value, float("-inf"))
        most = tl.max(value, 0)
        first = tl.min(tl.where((value == most) & (offset < VOCAB), offset, VOCAB), 0)
        token = tl.where(most > largest, first, token)
        largest = tl.maximum(most, largest)
    return largest, token, damaged > 0


@triton.jit
def _key(x):
    """Map a float to an integer: in the same order, adjacent floats to adjacent integers."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):
    """Return the float32 that `_key` maps to `key`, an int64."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _uniform(seed, position):
    """Return the random number in [0, 1), of 53 bits, for the output `position` of a request with `seed`."""
    c0 = tl.load(position).to(tl.uint32, bitcast=True)
    c1 = tl.load(position + 1).to(tl.uint32, bitcast=True)
    k0 = tl.load(seed).to(tl.uint32, bitcast=True)
    k1 = tl.load(seed + 1).to(tl.uint32, bitcast=True)
    zero = c0 * 0
    r0, r1, _, _ = philox_impl(c0, c1, zero, zero, k0, k1, 10)
    bits = ((r1.to(tl.uint64) << 32) | r0.to(tl.uint64)) >> 11
    return bits.to(tl.float64) * 1.1102230246251565e-16
