"""Self-test: one forward pass after loading, to find weights that compute NaN before the first request."""

import time

import numpy as np

from octavo.backends.base import Backend, SamplingBatch, StepBatch
from octavo.errors import DamagedWeights

_TOKENS = 2  # few, so that the step takes no longer than reading the weights once


def self_test(backend: Backend, max_tokens: int) -> tuple[float, int]:
    """Run a step of at most 2 tokens, and no more than `max_tokens`, and check that its logits are finite.

    The step overwrites page 0 of the KV pool, which must be allocated. Raises DamagedWeights.

    Returns the duration of the step in seconds, and its number of tokens.
    """
    started = time.monotonic()
    length = min(_TOKENS, max_tokens, backend.spec.max_positions)
    rows = np.arange(length, dtype=np.int32)
    batch = StepBatch(
        tokens=np.linspace(0, backend.spec.vocab_size - 1, length, dtype=np.int32),  # from all over the vocabulary
        positions=rows,
        query_start=np.array([0, length], np.int32),
        page_tables=np.zeros((1, 1), np.int32),
        sample_rows=rows[-1:],
        sampling=SamplingBatch.greedy(1),
    )
    if not np.isfinite(backend.logits(batch)).all():
        raise DamagedWeights(
            "the model computes logits that are NaN or infinite, so its weights are damaged or not made for the "
            "arithmetic of this backend; download the model again"
        )
    return time.monotonic() - started, length
