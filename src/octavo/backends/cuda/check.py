"""Check that a step stays inside of the model and the KV pool.

A kernel that reached outside would end the process's use of the device.
"""

from dataclasses import dataclass

import numpy as np

from octavo.backends.base import PoolingBatch, StepBatch


@dataclass(frozen=True)
class Limits:
    """What a step may reach: see CudaBackend for the names."""

    vocab_size: int
    page_size: int
    num_pages: int
    max_batch_tokens: int
    max_batch_size: int
    max_model_len: int

    def check(self, batch: StepBatch) -> None:
        """Raise ValueError if a step reaches outside of the model, of its page tables or of the pool."""
        rows, sampled = len(batch.tokens), len(batch.sample_rows)
        if rows > self.max_batch_tokens or sampled > self.max_batch_size:
            raise ValueError("a step has more tokens than max_batch_tokens, or more sampled rows than max_batch_size")
        if len(batch.positions) != rows or len(batch.sampling.temperature) != sampled:
            raise ValueError("a step needs one entry per token, and the sampling one entry per sampled row")
        lengths = np.diff(batch.query_start)
        if (
            len(lengths) != len(batch.page_tables)
            or batch.query_start[0] != 0
            or batch.query_start[-1] != rows
            or lengths.min(initial=0) < 0
        ):
            raise ValueError("query_start must run from 0 to the number of tokens, with an entry per sequence")
        if batch.pooling is not None:
            self._check_labels(batch.pooling, sampled)
        if not rows:
            return
        if batch.places is not None and not (
            len(batch.places) == sampled and _are_below(batch.places, self.max_batch_size)
        ):
            raise ValueError("places need one entry per sampled row, from 0 to max_batch_size - 1")
        if not _are_below(batch.tokens, self.vocab_size, -self.max_batch_size):
            raise ValueError("a token is not in the vocabulary, nor does it stand for one in a place")
        if not _are_below(batch.sample_rows, rows):
            raise ValueError("a sampled row is not in the step")
        self._check_positions(batch, lengths)

    def _check_labels(self, pooling: PoolingBatch, sampled: int) -> None:
        if not (_are_below(pooling.label_rows, sampled) and _are_below(pooling.label_tokens, self.vocab_size)):
            raise ValueError("a label is not in the vocabulary, or its row is not sampled")

    def _check_positions(self, batch: StepBatch, lengths: np.ndarray) -> None:
        full = lengths > 0
        starts, counts = batch.query_start[:-1][full], lengths[full]
        first = batch.positions[starts].astype(np.int64)
        if (batch.positions - np.repeat(first - starts, counts) != np.arange(len(batch.positions))).any():
            raise ValueError("a sequence's rows must be in order of position")
        last = first + counts - 1
        if first.min() < 0 or last.max() >= self.max_model_len:
            raise ValueError(f"a position is not from 0 to {self.max_model_len - 1}")
        pages = last // self.page_size + 1
        if pages.max() > batch.page_tables.shape[1]:
            raise ValueError("a position is past the end of its page table")
        used = batch.page_tables[full][np.arange(batch.page_tables.shape[1]) < pages[:, None]]
        if not _are_below(used, self.num_pages):
            raise ValueError("a page is not in the KV pool")


def _are_below(numbers: np.ndarray, end: int, first: int = 0) -> bool:
    """Return whether all are from `first` to end - 1."""
    return len(numbers) == 0 or bool(numbers.min() >= first and numbers.max() < end)
