"""Pooling: requests that want a vector of their prompt instead of a continuation.

The vector is the mean of the hidden states of all tokens, the hidden state of the last one, or the logits of some
tokens after the prompt (Pooling in messages.py).
"""

from typing import TYPE_CHECKING

import numpy as np

from octavo.backends.base import PoolingBatch, StepResult

from .sequence import Sequence

if TYPE_CHECKING:
    from .scheduler import StepPlan


def pooling_batch(
    plan: "StepPlan", query_start: np.ndarray, owner: np.ndarray, hidden_size: int
) -> PoolingBatch | None:
    """Return what the pooled sequences of a step want; None if there are none.

    Args:
        query_start: see StepBatch.
        owner: the index of the sequence of each sampled row, ascending.
    """
    pooled = _pooled(plan)
    if not pooled:
        return None
    first, end, sums, label_rows, label_tokens = [], [], [], list[int](), list[int]()
    for i, seq in pooled:
        if rows := seq.num_to_pool(plan.chunks[i]):
            end.append(int(query_start[i + 1]))
            first.append(end[-1] - rows)
            sums.append(np.zeros(hidden_size) if seq.sums is None else seq.sums)
        elif plan.completes(i):
            labels = seq.pooling.labels if seq.pooling else []
            label_rows += [int(np.searchsorted(owner, i))] * len(labels)
            label_tokens += labels
    return PoolingBatch(
        first=np.array(first, np.int32),
        end=np.array(end, np.int32),
        sums=np.array(sums, np.float64).reshape(len(sums), hidden_size),
        label_rows=np.array(label_rows, np.int32),
        label_tokens=np.array(label_tokens, np.int32),
    )


def take_pooled(plan: "StepPlan", result: StepResult) -> None:
    """Store the results of a step in its pooled sequences. To be called before their num_computed changes."""
    if result.sums is None or result.label_logits is None:
        return
    sums, logits = iter(result.sums), result.label_logits
    for i, seq in _pooled(plan):
        if seq.num_to_pool(plan.chunks[i]):
            seq.sums = next(sums).copy()  # not a view, which would keep those of all sequences
            seq.num_pooled = seq.num_computed + plan.chunks[i]
        elif plan.completes(i) and seq.pooling is not None:
            seq.label_logits, logits = np.split(logits, [len(seq.pooling.labels)])


def pooled_vector(seq: Sequence) -> np.ndarray:
    """Return the vector of a pooled sequence whose prompt is computed: float32 [hidden] or [labels]."""
    if seq.sums is None:
        assert seq.label_logits is not None
        return seq.label_logits
    assert seq.pooling is not None
    count = len(seq.tokens) if seq.pooling.hidden == "mean" else 1
    return (seq.sums / count).astype(np.float32)


def _pooled(plan: "StepPlan") -> list[tuple[int, Sequence]]:
    """Return the pooled sequences of a step with their indices. None of them is among the decoding ones."""
    sequences = enumerate(plan.sequences[plan.num_decoding :], plan.num_decoding)
    return [(i, seq) for i, seq in sequences if seq.pooling is not None]
