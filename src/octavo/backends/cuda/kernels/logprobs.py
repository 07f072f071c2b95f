"""The logprob and rank of each row's token among the raw logits, and the row's likeliest tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gathered import SMALL_BLOCK, count_above, cutoff_of, kth_largest
from .sampling_arrays import Sampled
from .selection import ONE, Selection, largest_of, logits_of_chunk, sums_of_chunks


def add_logprobs(logits: Tensor, wanted: Tensor, sampled: Sampled, drawn: Selection | None) -> None:
    """Write the logprobs, ranks and likeliest tokens of the raw logits beside the sampled tokens.

    Args:
        wanted: num_logprobs of each row.
        drawn: the selection that the tokens were drawn from, if it was among the raw logits.
    """
    rows, columns, words = sampled.rows, sampled.columns, sampled.words
    floats, top = words.view(torch.float32), 3 * rows
    likely = Selection.of(logits) if drawn is None else drawn.without_weights()
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
        largest, _best = largest_of(maxima, row, CHUNKS, WIDTH)
        total = tl.sum(sums_of_chunks(sums + row * CHUNKS, CHUNKS, WIDTH), 0)
        log_total = largest.to(tl.float64) + tl.log(total.to(tl.float64) / ONE)
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
    SMALL: tl.constexpr = SMALL_BLOCK if BLOCK > SMALL_BLOCK else BLOCK
    to_tokens, to_logprobs = to
    least = kth_largest(values, gathered, wanted, SMALL)
    ties = wanted - count_above(values, gathered, least, False, SMALL)
    cutoff = cutoff_of(values, tokens, gathered, least, ties, VOCAB, SMALL)
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
        token, x = logits_of_chunk(logits, row, tl.program_id(1), VOCAB, BLOCK)
        own = tl.load(logits + row.to(tl.int64) * VOCAB + chosen)
        likelier = (x > own) | ((x == own) & (token < chosen))
        tl.atomic_add(ranks + row, tl.sum(likelier.to(tl.int32), 0))
