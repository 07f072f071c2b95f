"""Hand-made StepBatches: the least that drives a Backend without an engine."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from octavo.backends.base import Backend, SamplingBatch, StepBatch


def sampling_batch(rows: int, **fields: np.ndarray) -> SamplingBatch:
    """Greedy sampling of `rows` rows, no logprobs; `fields` replace whole arrays."""
    return replace(SamplingBatch.greedy(rows), **{"seeds": np.arange(rows, dtype=np.uint64), **fields})


def step_batch(
    pieces: Sequence[tuple[Sequence[int], int, Sequence[int]]], sample: Sequence[int] | None = None
) -> StepBatch:
    """A step of `pieces`: (new tokens, position of the first, page table). `sample`: rows to sample; None: all."""
    lengths = [len(tokens) for tokens, _, _ in pieces]
    rows = sum(lengths)
    tables = np.zeros((len(pieces), max((len(pages) for _, _, pages in pieces), default=1)), np.int32)
    for table, (_, _, pages) in zip(tables, pieces, strict=True):
        table[: len(pages)] = pages
    sample_rows = np.arange(rows, dtype=np.int32) if sample is None else np.array(sample, np.int32)
    return StepBatch(
        tokens=np.array([token for tokens, _, _ in pieces for token in tokens], np.int32),
        positions=np.array([at + i for tokens, at, _ in pieces for i in range(len(tokens))], np.int32),
        query_start=np.array([0, *np.cumsum(lengths)], np.int32),
        page_tables=tables,
        sample_rows=sample_rows,
        sampling=sampling_batch(len(sample_rows)),
    )


def run_chunks(backend: Backend, tokens: Sequence[int], chunk: int, pages: Sequence[int]) -> np.ndarray:
    """Logits of every token, float32 [len(tokens), vocab], computed `chunk` tokens a step into the KV pages `pages`."""
    steps = [step_batch([(tokens[i : i + chunk], i, pages)]) for i in range(0, len(tokens), chunk)]
    return np.concatenate([backend.logits(step) for step in steps])
