"""The weights of a row's logits, and the few logits among which top_k and top_p end.

    weight(x) = floor(2^44 exp2((x - largest) log2(e) / temperature))

The sums of weights are exact in any order (2^44 times the largest vocabulary is below 2^63).

Truncation does not sort. A histogram of the logits in bins of 1/16 octave of weight tells which few bins top_k and
top_p can end in: the counts of bins are exact, and their weights are known within a bin's width. The logits in those
bins are gathered; gathered.py searches them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE = tl.constexpr(float(1 << 44))  # the largest weight
_BLOCK = 4096  # logits of a chunk
_BINS = 512
_PER_OCTAVE = tl.constexpr(16.0)  # bins
_LOG2E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@dataclass
class Selection:
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
    def of(cls, logits: Tensor) -> "Selection":
        """Find the maxima of rows of logits."""
        rows, vocab = logits.shape
        block = min(_BLOCK, triton.next_power_of_2(vocab))
        chunks = triton.cdiv(vocab, block)
        maxima = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
        firsts = torch.empty_like(maxima, dtype=torch.int32)
        made = cls._unweighed(logits, chunks, block, maxima, firsts)
        _survey[(rows, chunks)](logits, maxima, firsts, CHUNKS=chunks, **made.shape, num_warps=4)
        return made

    def without_weights(self) -> "Selection":
        """Return a selection among the same logits, to weigh them otherwise."""
        return self._unweighed(self.logits, self.chunks, self.block, self.maxima, self.firsts)

    @classmethod
    def _unweighed(cls, logits: Tensor, chunks: int, block: int, maxima: Tensor, firsts: Tensor) -> "Selection":
        """Return a selection whose last four arrays are not used: `weigh` makes them if it truncates."""
        sums = torch.empty((3, *maxima.shape), dtype=torch.int64, device=logits.device)
        return cls(logits, chunks, block, maxima, firsts, sums, firsts, firsts, maxima, firsts)

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        return self.maxima, self.firsts, self.sums, self.found, self.values, self.tokens

    @property
    def shape(self) -> dict[str, int]:
        return {"VOCAB": self.logits.shape[1], "BLOCK": self.block}

    @property
    def constants(self) -> dict[str, int]:
        return self.shape | {"CHUNKS": self.chunks, "WIDTH": triton.next_power_of_2(self.chunks)}

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
            self.sums, self.bins, self.found, *parameters, ALL=all_above, BINS=_BINS, **self.constants, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
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


@triton.jit
def _survey(logits, maxima, firsts, CHUNKS: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Write the largest logit of a chunk, +inf if one is NaN or +inf, and the first token that has it."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    token, x = logits_of_chunk(logits, row, chunk, VOCAB, BLOCK)
    x = tl.where(x < float("inf"), x, float("inf"))
    largest = tl.max(x, 0)
    at = row * CHUNKS + chunk
    tl.store(maxima + at, largest)
    tl.store(firsts + at, tl.min(tl.where((x == largest) & (token < VOCAB), token, VOCAB), 0))


@triton.jit
def logits_of_chunk(logits, row, chunk, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return the tokens of a chunk, and their logits in a row: -inf past the vocabulary."""
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    return token, tl.load(logits + row.to(tl.int64) * VOCAB + token, mask=token < VOCAB, other=float("-inf"))


@triton.jit
def sums_of_chunks(sums, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Return a row's CHUNKS sums, then zeros: int64 [WIDTH]."""
    chunk = tl.arange(0, WIDTH)
    return tl.load(sums + chunk, mask=chunk < CHUNKS, other=0)


@triton.jit
def is_finite(largest):
    """Return whether a row with this largest logit (see Selection.maxima) can be sampled."""
    return (largest < float("inf")) & (largest > float("-inf"))


@triton.jit
def largest_of(maxima, row, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the largest logit of a row, and the first chunk that has it."""
    chunk = tl.arange(0, WIDTH)
    x = tl.load(maxima + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"))
    largest = tl.max(x, 0)
    return largest, tl.min(tl.where(x == largest, chunk, WIDTH), 0)


@triton.jit
def options(temperatures, top_ks, top_ps, row, VOCAB: tl.constexpr):
    """Return the factor of a row's logits, top_k (VOCAB: all), top_p, and whether they truncate."""
    scale = tl.minimum(_LOG2E / tl.load(temperatures + row), _LARGEST)
    top_k = tl.load(top_ks + row)
    top_k = tl.where((top_k > 0) & (top_k < VOCAB), top_k, VOCAB)
    top_p = tl.load(top_ps + row)
    return scale, top_k, top_p, (top_k < VOCAB) | (top_p < 1)


@triton.jit
def weight_of(x, largest, scale):
    """Return the weight of logits in fixed point, int64."""
    return (tl.exp2((x - largest) * scale) * ONE).to(tl.int64)


@triton.jit
def least_weight(min_p):
    return (min_p * ONE).to(tl.int64)


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
    largest, _best = largest_of(maxima, row, CHUNKS, WIDTH)
    if (tl.load(temperatures + row) > 0) & is_finite(largest):
        scale, _k, _p, truncated = options(temperatures, top_ks, top_ps, row, VOCAB)
        token, x = logits_of_chunk(logits, row, chunk, VOCAB, BLOCK)
        weight = weight_of(x, largest, scale)
        at = row * CHUNKS + chunk
        kept = tl.where(weight >= least_weight(tl.load(min_ps + row)), weight, 0)
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
    _scale, top_k, top_p, truncated = options(temperatures, top_ks, top_ps, row, VOCAB)
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
            total = tl.sum(sums_of_chunks(sums + row * CHUNKS, CHUNKS, WIDTH), 0).to(tl.float64) / ONE
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
    largest, _best = largest_of(maxima, row, CHUNKS, WIDTH)
    scale, _k, _p, truncated = options(temperatures, top_ks, top_ps, row, VOCAB)
    if truncated & is_finite(largest) & (tl.load(temperatures + row) > 0):
        first = tl.load(found + 4 * row + 1)
        last = tl.load(found + 4 * row + 2)
        token, x = logits_of_chunk(logits, row, chunk, VOCAB, BLOCK)
        weight = weight_of(x, largest, scale)
        bin = _bin(x, largest, scale, BINS)
        sure = tl.where(bin < first, weight, 0)
        at = row * CHUNKS + chunk
        kept = tl.where(sure >= least_weight(tl.load(min_ps + row)), sure, 0)
        tl.store(sums + rows * CHUNKS + at, tl.sum(sure, 0))
        tl.store(sums + 2 * rows * CHUNKS + at, tl.sum(kept, 0))
        here = ((bin >= first) & (bin <= last) & (token < VOCAB)).to(tl.int32)
        place = tl.cumsum(here, 0) - 1
        to = row.to(tl.int64) * VOCAB + tl.atomic_add(found + 4 * row, tl.sum(here, 0)) + place
        tl.store(values + to, x, mask=here > 0)
        tl.store(tokens + to, token, mask=here > 0)
