"""The steps that a backend runs before the first request, to compile its kernels and record its graphs."""

from dataclasses import replace

import numpy as np

from octavo.backends.base import SamplingBatch, StepBatch


def decode(rows: int) -> StepBatch:
    """Return a greedy step of `rows` sequences of one token each, which all write to the first position of page 0."""
    zeros = np.zeros(rows, np.int32)
    one_each = np.arange(rows + 1, dtype=np.int32)
    return StepBatch(zeros, zeros, one_each, zeros[:, None], one_each[:-1], SamplingBatch.greedy(rows))


def chunk(rows: int) -> StepBatch:
    """Return a step of one sequence of `rows` tokens, all at position 0 of page 0.

    No engine makes such a step, and `launch` refuses it. It has the size of a chunk, and needs no other page: a tile
    of attention takes its rows for positions 0, 1, 2 and so on, and finds page 0 everywhere.
    """
    zeros = np.zeros(rows, np.int32)
    ends = np.array([0, rows], np.int32)
    return StepBatch(zeros, zeros, ends, zeros[None], zeros[:1], SamplingBatch.greedy(1))


def step_of_every_kind(rows: int = 1) -> StepBatch:
    """Return a step of `rows` sequences that uses every option of sampling, and so each of its kernels."""
    zeros, ones, half = np.zeros(rows, np.int32), np.ones(rows, np.int32), np.full(rows, 0.5, np.float32)
    one_each = np.arange(rows + 1, dtype=np.int32)
    return replace(
        decode(rows),
        sampling=replace(
            SamplingBatch.greedy(rows),
            temperature=half,
            top_k=ones,
            top_p=half,
            min_p=half,
            num_logprobs=ones,
            repetition=half,
            presence=half,
            frequency=half,
            history=zeros,
            history_start=one_each,
            history_outputs=ones,
            bias_tokens=zeros,
            bias_values=half,
            bias_start=one_each,
            masks=np.ones(rows, np.uint32),
            mask_start=one_each,
        ),
    )
