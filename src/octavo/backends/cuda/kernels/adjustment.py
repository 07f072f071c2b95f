"""Logits before a token is drawn from them: biases, penalties and masks."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.backends.base import SamplingBatch

from .sampling_arrays import DeviceSampling

_SEEN = tl.constexpr(1 << 30)  # a bit of a token's count: it is in the history; the bits below count it in the output


def adjust(logits: Tensor, sampling: DeviceSampling, batch: SamplingBatch) -> Tensor:
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
