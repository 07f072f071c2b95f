"""Sampling on the device: what SamplingBatch (backends/base.py) describes.

A row's logits are cut into chunks, and programs take a chunk each, so that one row uses the whole device. A row's
result depends on the row only, because what is added across chunks are integers: counts, and weights in fixed point
(selection.py), whose sums are exact in any order.

In order: adjustment.py applies biases, penalties and masks; selection.py finds the maxima and, where top_k or top_p
truncate, the few logits among which they end; draw.py picks the token; logprobs.py ranks it among the raw logits.
"""

import torch
from torch import Tensor

from octavo.backends.base import SamplingBatch

from .adjustment import adjust
from .draw import draw
from .logprobs import add_logprobs
from .sampling_arrays import DeviceSampling, Sampled
from .selection import Selection


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
    adjusted = adjust(logits, sampling, batch)
    selection = Selection.of(adjusted)
    drawn = batch.temperature > 0
    if drawn.any():
        truncated = drawn & ((batch.top_k > 0) & (batch.top_k < vocab) | (batch.top_p < 1))
        parameters = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        selection.weigh(*parameters, truncate=bool(truncated.any()))
    draw(selection, sampling, words)
    if most >= 0:
        add_logprobs(logits, sampling.num_logprobs, sampled, selection if adjusted is logits else None)
    return sampled
