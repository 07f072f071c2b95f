"""Sampling on the device: what SamplingBatch (backends/base.py) describes.

A row's logits are cut into chunks, and programs take a chunk each, so that one row uses the whole device. A row's
result depends on the row only, because what is added across chunks are integers: counts, and weights in fixed point,

    weight(x) = floor(2^44 exp2((x - largest) log2(e) / temperature))

whose sums are exact in any order (2^44 times the largest vocabulary is below 2^63). A draw takes, in order of token id,
the first token whose cumulative weight exceeds u times the total, where u is Philox4x32-10 of the row's seed and
position.

Truncation does not sort. A histogram of the logits in bins of 1/16 octave of weight tells which few bins top_k and
top_p can end in: the counts of bins are exact, and their weights are known within a bin's width. The logits in those
bins are gathered, and bisection over floats among them finds the smallest logit that remains, as on the CPU
(csrc/kernels/sampler.cpp).
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from octavo.backends.base import SamplingBatch, StepResult

_BLOCK = 4096  # logits of a chunk
_SMALL = tl.constexpr(1024)  # gathered logits read at a time
_BINS = 512
_PER_OCTAVE = tl.constexpr(16.0)  # bins
_ONE = tl.constexpr(float(1 << 44))  # the largest weight
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
    adjusted = _adjusted(logits, sampling, batch)
    draw = _Selection.of(adjusted)
    draw.survey()
    drawn = batch.temperature > 0
    truncated = drawn & ((batch.top_k > 0) & (batch.top_k < vocab) | (batch.top_p < 1))
    parameters = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    if drawn.any():
        draw.weigh(*parameters, truncate=bool(truncated.any()))
    _draw[(rows,)](
        adjusted,
        *draw.arrays,
        *parameters,
        sampling.seeds,
        sampling.positions,
        words,
        **draw.constants,
        num_warps=8,
        enable_fp_fusion=False,
    )
    if most >= 0:
        _add_logprobs(logits, sampling.num_logprobs, sampled, draw if adjusted is logits else None)
    return sampled


def _add_logprobs(logits: Tensor, wanted: Tensor, sampled: Sampled, drawn: "_Selection | None") -> None:
    """Write the logprobs, ranks and likeliest tokens of the raw logits beside the sampled tokens.

    Args:
        wanted: num_logprobs of each row.
        drawn: the selection that the tokens were drawn from, if it was among the raw logits.
    """
    rows, columns, words = sampled.rows, sampled.columns, sampled.words
    floats, top = words.view(torch.float32), 3 * rows
    likely = _Selection.of(logits)
    if drawn is None:
        likely.survey()
    else:
        likely.maxima, likely.firsts = drawn.maxima, drawn.firsts
    ones = torch.ones(rows, dtype=torch.float32, device=logits.device)
    likely.weigh(ones, wanted, ones, torch.zeros_like(ones), truncate=columns > 0, all_above=True)
    words[2 * rows : top].zero_()
    if columns:
        words[top : top + rows * columns].fill_(-1)
        floats[top + rows * columns :].fill_(torch.nan)
    outputs = (words, floats[rows:], words[2 * rows :], words[top:], floats[top + rows * columns :])
    _logprobs[(rows,)](
        logits, *likely.arrays, wanted, *outputs, columns, **likely.constants, num_warps=8, enable_fp_fusion=False
    )
    _count_likelier[(rows, likely.chunks)](logits, wanted, words, words[2 * rows :], **likely.shape, num_warps=4)


@dataclass
class _Selection:
    """What is known of rows of logits, [R, vocab], in C chunks.

    Attributes:
        maxima: float32 [R, C]: the largest logit; +inf if one is NaN or +inf.
        firsts: int32 [R, C]: the first token that has it.
        sums: int64 [3, R, C]: weights of all tokens; of those that top_k and top_p surely keep; and of those of them
            that min_p keeps too.
        bins: int32 [R, BINS]: logits in each bin.
        found: int32 [R, 4]: the number of logits gathered; the first and last bin that are; the logits in bins before.
        values, tokens: float32 and int32 [R, vocab]: the gathered logits, in any order.
    """

    logits: Tensor
    chunks: int
    block: int
    maxima: Tensor
    firsts: Tensor
    sums: Tensor
    bins: Tensor
    found: Tensor
    values: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "_Selection":
        rows, vocab = logits.shape
        block = min(_BLOCK, triton.next_power_of_2(vocab))
        chunks = triton.cdiv(vocab, block)

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=logits.device)

        maxima, values = new(rows, chunks, dtype=torch.float32), new(1, dtype=torch.float32)
        sums = new(3, rows, chunks, dtype=torch.int64)
        return cls(logits, chunks, block, maxima, new(rows, chunks), sums, new(1), new(1), values, new(1))

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        return self.maxima, self.firsts, self.sums, self.found, self.values, self.tokens

    @property
    def shape(self) -> dict[str, int]:
        return {"VOCAB": self.logits.shape[1], "BLOCK": self.block}

    @property
    def constants(self) -> dict[str, int]:
        return self.shape | {"CHUNKS": self.chunks, "WIDTH": triton.next_power_of_2(self.chunks)}

    def survey(self) -> None:
        """Find the maxima."""
        grid = (len(self.logits), self.chunks)
        _survey[grid](self.logits, self.maxima, self.firsts, CHUNKS=self.chunks, **self.shape, num_warps=4)

    def weigh(
        self, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, truncate: bool, all_above: bool = False
    ) -> None:
        """Sum the weights; if `truncate`, gather the logits among which top_k and top_p end.

        Args:
            all_above: gather the likelier logits too.
        """
        rows = len(self.logits)
        if truncate:
            zeros = torch.zeros(rows * (_BINS + 4), dtype=torch.int32, device=self.logits.device)
            self.found, self.bins = zeros[: 4 * rows], zeros[4 * rows :]
            self.values = torch.empty_like(self.logits)
            self.tokens = torch.empty_like(self.logits, dtype=torch.int32)
        parameters, grid = (temperature, top_k, top_p, min_p), (rows, self.chunks)
        _weigh[grid](
            self.logits,
            self.maxima,
            self.sums,
            self.bins,
            *parameters,
            rows,
            BINS=_BINS,
            **self.constants,
            num_warps=4,
            enable_fp_fusion=False,
        )
        if not truncate:
            return
        _bound[(rows,)](
            self.sums, self.bins, self.found, *parameters, ALL=all_above, BINS=_BINS, **self.constants, num_warps=4
        )
        _gather[grid](
            self.logits,
            self.maxima,
            self.sums,
            self.found,
            self.values,
            self.tokens,
            *parameters,
            rows,
            BINS=_BINS,
            **self.constants,
            num_warps=4,
            enable_fp_fusion=False,
        )


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


@triton.jit
def _survey(logits, maxima, firsts, CHUNKS: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Write the largest logit of a chunk, +inf if one is NaN or +inf, and the first token that has it."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * VOCAB + token, mask=token < VOCAB, other=float("-inf"))
    x = tl.where(x < float("inf"), x, float("inf"))
    largest = tl.max(x, 0)
    at = row * CHUNKS + chunk
    tl.store(maxima + at, largest)
    tl.store(firsts + at, tl.min(tl.where((x == largest) & (token < VOCAB), token, VOCAB), 0))


@triton.jit
def _largest(maxima, row, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the largest logit of a row, and the first chunk that has it."""
    chunk = tl.arange(0, WIDTH)
    x = tl.load(maxima + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"))
    largest = tl.max(x, 0)
    return largest, tl.min(tl.where(x == largest, chunk, WIDTH), 0)


@triton.jit
def _options(temperatures, top_ks, top_ps, row, VOCAB: tl.constexpr):
    """Return the factor of a row's logits, top_k (VOCAB: all), top_p, and whether they truncate."""
    scale = tl.minimum(_LOG2E / tl.load(temperatures + row), _LARGEST)
    top_k = tl.load(top_ks + row)
    top_k = tl.where((top_k > 0) & (top_k < VOCAB), top_k, VOCAB)
    top_p = tl.load(top_ps + row)
    return scale, top_k, top_p, (top_k < VOCAB) | (top_p < 1)


@triton.jit
def _weight(x, largest, scale):
    """Return the weight of logits in fixed point, int64."""
    return (tl.exp2((x - largest) * scale) * _ONE).to(tl.int64)


@triton.jit
def _least_weight(min_p):
    return (min_p * _ONE).to(tl.int64)


@triton.jit
def _bin(x, largest, scale, BINS: tl.constexpr):
    """Return the bins of logits: 0 for the largest ones. The last bin has all that weigh less than the others."""
    return tl.minimum((largest - x) * scale * _PER_OCTAVE, BINS - 1.0).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def _weigh(
    logits,
    maxima,
    sums,
    bins,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    rows,
    BINS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the weight of a chunk, and what min_p keeps of it; if the row is truncated, count its logits by bin."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    largest, _best = _largest(maxima, row, CHUNKS, WIDTH)
    if (tl.load(temperatures + row) > 0) & (largest < float("inf")) & (largest > float("-inf")):
        scale, _k, _p, truncated = _options(temperatures, top_ks, top_ps, row, VOCAB)
        token = chunk * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row.to(tl.int64) * VOCAB + token, mask=token < VOCAB, other=float("-inf"))
        weight = _weight(x, largest, scale)
        at = row * CHUNKS + chunk
        kept = tl.where(weight >= _least_weight(tl.load(min_ps + row)), weight, 0)
        tl.store(sums + at, tl.sum(weight, 0))
        tl.store(sums + 2 * rows * CHUNKS + at, tl.sum(kept, 0))
        if truncated:
            count = tl.histogram(_bin(x, largest, scale, BINS), BINS, mask=token < VOCAB)
            tl.atomic_add(bins + row * BINS + tl.arange(0, BINS), count, mask=count > 0)


@triton.jit
def _bound(
    sums,
    bins,
    found,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    ALL: tl.constexpr,
    BINS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the first and the last bin to gather, and the number of logits in the bins before."""
    row = tl.program_id(0)
    _scale, top_k, top_p, truncated = _options(temperatures, top_ks, top_ps, row, VOCAB)
    if truncated & (tl.load(temperatures + row) > 0):
        bin = tl.arange(0, BINS)
        count = tl.load(bins + row * BINS + bin)
        until = tl.cumsum(count, 0)
        last = tl.minimum(tl.sum((until < top_k).to(tl.int32), 0), BINS - 1)
        first = last
        if top_p < 1:
            # Weights of bins, as fractions of the largest weight; the margin covers the rounding of exp2 and of sums.
            high = tl.exp2(-bin.to(tl.float32) / _PER_OCTAVE).to(tl.float64) * 1.0001
            low = tl.where(
                bin < BINS - 1, tl.exp2(-(bin + 1).to(tl.float32) / _PER_OCTAVE).to(tl.float64) * 0.9999, 0.0
            )
            most = tl.cumsum(high * count, 0)
            least = tl.cumsum(low * count, 0)
            chunk = tl.arange(0, WIDTH)
            weights = tl.load(sums + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=0)
            total = tl.sum(weights, 0).to(tl.float64) / _ONE
            if top_k < VOCAB:  # the bin of the k-th logit may be kept in part
                least_total = tl.max(tl.where(bin < last, least, 0.0), 0)
                most_total = tl.max(tl.where(bin <= last, most, 0.0), 0)
            else:
                least_total = total * 0.9999
                most_total = total * 1.0001
            first = tl.minimum(tl.sum((most < top_p * least_total).to(tl.int32), 0), last)
            if top_k == VOCAB:
                last = tl.minimum(tl.sum((least < top_p * most_total).to(tl.int32), 0), BINS - 1)
        if ALL:
            first = 0
        tl.store(found + 4 * row + 1, first)
        tl.store(found + 4 * row + 2, last)
        tl.store(found + 4 * row + 3, tl.sum(tl.where(bin < first, count, 0), 0))


@triton.jit(do_not_specialize=["rows"])
def _gather(
    logits,
    maxima,
    sums,
    found,
    values,
    tokens,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    rows,
    BINS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gather the logits of the bins that `_bound` wrote, and sum the weights of the bins before, chunk by chunk."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    largest, _best = _largest(maxima, row, CHUNKS, WIDTH)
    scale, _k, _p, truncated = _options(temperatures, top_ks, top_ps, row, VOCAB)
    healthy = (largest < float("inf")) & (largest > float("-inf"))
    if truncated & healthy & (tl.load(temperatures + row) > 0):
        first = tl.load(found + 4 * row + 1)
        last = tl.load(found + 4 * row + 2)
        token = chunk * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row.to(tl.int64) * VOCAB + token, mask=token < VOCAB, other=float("-inf"))
        weight = _weight(x, largest, scale)
        bin = _bin(x, largest, scale, BINS)
        sure = tl.where(bin < first, weight, 0)
        at = row * CHUNKS + chunk
        kept = tl.where(sure >= _least_weight(tl.load(min_ps + row)), sure, 0)
        tl.store(sums + rows * CHUNKS + at, tl.sum(sure, 0))
        tl.store(sums + 2 * rows * CHUNKS + at, tl.sum(kept, 0))
        here = ((bin >= first) & (bin <= last) & (token < VOCAB)).to(tl.int32)
        place = tl.cumsum(here, 0) - 1
        to = row.to(tl.int64) * VOCAB + tl.atomic_add(found + 4 * row, tl.sum(here, 0)) + place
        tl.store(values + to, x, mask=here > 0)
        tl.store(tokens + to, token, mask=here > 0)


@triton.jit
def _draw(
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
    largest, best = _largest(maxima, row, CHUNKS, WIDTH)
    result = tl.load(firsts + row * CHUNKS + best)
    failed = (largest == float("inf")) | (largest == float("-inf"))
    if (tl.load(temperatures + row) > 0) & (not failed):
        scale, top_k, top_p, truncated = _options(temperatures, top_ks, top_ps, row, VOCAB)
        min_weight = _least_weight(tl.load(min_ps + row))
        all_sums = sums + row * CHUNKS
        size = tl.num_programs(0) * CHUNKS
        kept_sums = all_sums + 2 * size
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
        chunk = tl.arange(0, WIDTH)
        weights = tl.load(kept_sums + chunk, mask=chunk < CHUNKS, other=0)
        total = tl.sum(weights, 0)
        goal = (_uniform(seeds + 2 * row, positions + 2 * row) * total.to(tl.float64)).to(tl.int64)
        goal = tl.minimum(goal, total - 1)
        until = tl.cumsum(weights, 0)
        chosen = tl.minimum(tl.sum((until <= goal).to(tl.int32), 0), CHUNKS - 1)
        before = tl.sum(tl.where(chunk < chosen, weights, 0), 0)
        token = chosen * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row.to(tl.int64) * VOCAB + token, mask=token < VOCAB, other=float("-inf"))
        weight = _weight(x, largest, scale)
        kept = ((x > least) | ((x == least) & (token <= cutoff))) & (weight >= min_weight)
        running = before + tl.cumsum(tl.where(kept, weight, 0), 0)
        result = tl.min(tl.where(running > goal, token, VOCAB - 1), 0)
    tl.store(out + row, tl.where(failed, -1, result))


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
    SMALL: tl.constexpr = _SMALL if BLOCK > _SMALL else BLOCK
    gathered = tl.load(found)
    chunk = tl.arange(0, WIDTH)
    total = tl.sum(tl.load(all_sums + chunk, mask=chunk < CHUNKS, other=0), 0)
    sure = tl.sum(tl.load(all_sums + size + chunk, mask=chunk < CHUNKS, other=0), 0)
    least = float("-inf")
    ties = VOCAB
    if top_k < VOCAB:
        wanted = top_k - tl.load(found + 3)
        least = _kth_largest(values, gathered, wanted, SMALL)
        ties = wanted - _count_above(values, gathered, least, SMALL)
        total = sure + _weight_above(values, gathered, least, largest, scale, SMALL)
        total += ties * _weight(least, largest, scale)
    if top_p < 1:
        target = top_p.to(tl.float64) * total.to(tl.float64)
        low, high = _keys(values, gathered, SMALL)
        low = tl.maximum(low, _key(tl.zeros((), tl.float32) + least).to(tl.int64))
        while low < high:
            middle = low + (high - low + 1) // 2
            weight = sure + _weight_from(values, gathered, _value(middle), largest, scale, SMALL)
            enough = weight.to(tl.float64) >= target
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        last = _value(low)
        above = sure + _weight_above(values, gathered, last, largest, scale, SMALL)
        each = tl.maximum(_weight(last, largest, scale), 1).to(tl.float64)
        needed = tl.minimum(tl.ceil((target - above.to(tl.float64)) / each), VOCAB * 1.0).to(tl.int32)
        needed = tl.maximum(needed, 1)
        ties = tl.where(last == least, tl.minimum(ties, needed), needed)
        least = last
    cutoff = _cutoff(values, tokens, gathered, least, ties, VOCAB, SMALL)
    start = 0
    while start < gathered:
        at = start + tl.arange(0, SMALL)
        x = tl.load(values + at, mask=at < gathered, other=float("-inf"))
        token = tl.load(tokens + at, mask=at < gathered, other=0)
        weight = _weight(x, largest, scale)
        kept = (x > least) | ((x == least) & (token <= cutoff))
        kept = kept & (weight >= min_weight) & (at < gathered)
        tl.atomic_add(all_sums + 2 * size + token // BLOCK, weight, mask=kept)
        start += SMALL
    tl.debug_barrier()
    return least, cutoff


@triton.jit(
    do_not_specialize=["columns"],
    do_not_specialize_on_alignment=["logprobs", "ranks", "top_tokens", "top_logprobs"],
)
def _logprobs(
    logits,
    maxima,
    firsts,
    sums,
    found,
    values,
    tokens,
    nums_logprobs,
    sampled,
    logprobs,
    ranks,
    top_tokens,
    top_logprobs,
    columns,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the logprob of a row's token, and its likeliest tokens with theirs, in any order."""
    row = tl.program_id(0)
    wanted = tl.load(nums_logprobs + row)
    token = tl.load(sampled + row)
    logprob = float("nan")
    if (wanted >= 0) & (token >= 0):
        largest, _best = _largest(maxima, row, CHUNKS, WIDTH)
        chunk = tl.arange(0, WIDTH)
        total = tl.sum(tl.load(sums + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=0), 0)
        log_total = largest.to(tl.float64) + tl.log(total.to(tl.float64) / _ONE)
        logits += row.to(tl.int64) * VOCAB
        logprob = (tl.load(logits + token).to(tl.float64) - log_total).to(tl.float32)
        if wanted > 0:
            at = row.to(tl.int64) * columns
            whole = row.to(tl.int64) * VOCAB
            gathered = tl.load(found + 4 * row)
            if wanted >= VOCAB:  # nothing was gathered
                _write_all(logits, log_total, top_tokens + at, top_logprobs + at, VOCAB, BLOCK)
            else:
                to = (top_tokens + at, top_logprobs + at)
                _write_likeliest(values + whole, tokens + whole, gathered, wanted, log_total, to, VOCAB, BLOCK)
        tl.store(ranks + row, 1)
    tl.store(logprobs + row, logprob)


@triton.jit
def _write_all(logits, log_total, to_tokens, to_logprobs, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    start = 0
    while start < VOCAB:
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < VOCAB, other=0.0)
        tl.store(to_tokens + token, token, mask=token < VOCAB)
        tl.store(to_logprobs + token, (x.to(tl.float64) - log_total).to(tl.float32), mask=token < VOCAB)
        start += BLOCK


@triton.jit
def _write_likeliest(values, tokens, gathered, wanted, log_total, to, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Write the `wanted` likeliest of the gathered tokens; of equal logits, the lower tokens."""
    SMALL: tl.constexpr = _SMALL if BLOCK > _SMALL else BLOCK
    to_tokens, to_logprobs = to
    least = _kth_largest(values, gathered, wanted, SMALL)
    ties = wanted - _count_above(values, gathered, least, SMALL)
    cutoff = _cutoff(values, tokens, gathered, least, ties, VOCAB, SMALL)
    written = 0
    start = 0
    while start < gathered:
        at = start + tl.arange(0, SMALL)
        x = tl.load(values + at, mask=at < gathered, other=float("-inf"))
        token = tl.load(tokens + at, mask=at < gathered, other=VOCAB)
        kept = ((x > least) | ((x == least) & (token <= cutoff))) & (at < gathered)
        place = written + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(to_tokens + place, token, mask=kept)
        tl.store(to_logprobs + place, (x.to(tl.float64) - log_total).to(tl.float32), mask=kept)
        written += tl.sum(kept.to(tl.int32), 0)
        start += SMALL


@triton.jit(do_not_specialize_on_alignment=["ranks"])
def _count_likelier(logits, nums_logprobs, sampled, ranks, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Add to the rank of a row's token the number of likelier ones in a chunk; of equal logits, the lower token is."""
    row = tl.program_id(0)
    chosen = tl.load(sampled + row)
    if (tl.load(nums_logprobs + row) >= 0) & (chosen >= 0):
        logits += row.to(tl.int64) * VOCAB
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < VOCAB, other=float("-inf"))
        own = tl.load(logits + chosen)
        likelier = (x > own) | ((x == own) & (token < chosen))
        tl.atomic_add(ranks + row, tl.sum(likelier.to(tl.int32), 0))


@triton.jit
def _keys(x, count, BLOCK: tl.constexpr):
    """Return the keys of the smallest and the largest of `count` values."""
    least = float("inf")
    most = float("-inf")
    start = 0
    while start < count:
        at = start + tl.arange(0, BLOCK)
        least = tl.minimum(least, tl.min(tl.load(x + at, mask=at < count, other=float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.load(x + at, mask=at < count, other=float("-inf")), 0))
        start += BLOCK
    return _key(least).to(tl.int64), _key(most).to(tl.int64)


@triton.jit
def _kth_largest(x, count, k, BLOCK: tl.constexpr):
    """Return the k-th largest of `count` values, 1 <= k <= count."""
    low, high = _keys(x, count, BLOCK)
    while low < high:
        middle = low + (high - low + 1) // 2
        bound = _value(middle)
        found = 0
        start = 0
        while start < count:
            at = start + tl.arange(0, BLOCK)
            value = tl.load(x + at, mask=at < count, other=float("nan"))
            found += tl.sum((value >= bound).to(tl.int32), 0)
            start += BLOCK
        low = tl.where(found >= k, middle, low)
        high = tl.where(found >= k, high, middle - 1)
    return _value(low)


@triton.jit
def _count_above(x, count, bound, BLOCK: tl.constexpr):
    found = 0
    start = 0
    while start < count:
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count, other=float("-inf"))
        found += tl.sum((value > bound).to(tl.int32), 0)
        start += BLOCK
    return found


@triton.jit
def _cutoff(x, tokens, count, value, ties, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
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
def _weight_from(x, count, least, largest, scale, BLOCK: tl.constexpr):
    """Return the weight of the values of at least `least`."""
    total = tl.full((), 0, tl.int64)
    start = 0
    while start < count:
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count, other=float("-inf"))
        kept = (value >= least) & (at < count)
        total += tl.sum(tl.where(kept, _weight(value, largest, scale), 0), 0)
        start += BLOCK
    return total


@triton.jit
def _weight_above(x, count, bound, largest, scale, BLOCK: tl.constexpr):
    """Return the weight of the values above `bound`."""
    total = tl.full((), 0, tl.int64)
    start = 0
    while start < count:
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count, other=float("-inf"))
        total += tl.sum(tl.where(value > bound, _weight(value, largest, scale), 0), 0)
        start += BLOCK
    return total


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
    r0, r1, _r2, _r3 = philox_impl(c0, c1, zero, zero, k0, k1, 10)
    bits = ((r1.to(tl.uint64) << 32) | r0.to(tl.uint64)) >> 11
    return bits.to(tl.float64) * 1.1102230246251565e-16
