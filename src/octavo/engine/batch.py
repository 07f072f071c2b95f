"""Turns a StepPlan into the flat arrays of a StepBatch.

What does not change from step to step lives in columns, a row per running sequence (its slot), so that a step gathers
with a few numpy calls instead of touching every parameter of every sequence in Python.
"""

import math
from array import array
from typing import Any

import numpy as np

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.kv import SequencePages

from .scheduler import StepPlan
from .sequence import Sequence

_NO_TOKENS: "array[int]" = array("i")
_NO_BIAS: dict[int, float] = {}


class BatchBuilder:
    """Columns for `max_running` slots and page tables of `max_pages` entries each; pages of `page_size` tokens."""

    def __init__(self, max_running: int, max_pages: int, page_size: int):
        n = max_running
        self._page_size = page_size
        self._owner: list[SequencePages | None] = [None] * n
        self._num_pages = [0] * n  # entries of the page table that are filled in
        self._page_tables = np.zeros((n, max_pages), np.int32)
        self._temperature = np.zeros(n, np.float32)
        self._top_k = np.zeros(n, np.int32)
        self._top_p = np.ones(n, np.float32)
        self._min_p = np.zeros(n, np.float32)
        self._seeds = np.zeros(n, np.uint64)
        self._num_logprobs = np.full(n, -1, np.int32)
        self._repetition = np.ones(n, np.float32)
        self._presence = np.zeros(n, np.float32)
        self._frequency = np.zeros(n, np.float32)
        self._penalised = np.zeros(n, bool)
        self._biased = np.zeros(n, bool)

    def build(self, plan: StepPlan) -> StepBatch:
        for seq in plan.sequences:
            self._refresh(seq)
        rows = [chunk + len(plan.guesses.get(i, ())) for i, chunk in enumerate(plan.chunks)]
        chunks = np.array(rows, np.int32)
        query_start = np.zeros(len(chunks) + 1, np.int32)
        np.cumsum(chunks, out=query_start[1:])
        computed = np.array([seq.num_computed for seq in plan.sequences], np.int32)
        sampled = [
            (i, ahead) for i in range(len(rows)) if plan.ends(i) for ahead in range(1 + len(plan.guesses.get(i, ())))
        ]
        slots = np.array([seq.slot for seq in plan.sequences], np.intp)
        width = -(-int((computed + chunks).max()) // self._page_size)
        return StepBatch(
            tokens=_gather_tokens(plan),
            positions=np.arange(query_start[-1], dtype=np.int32) + np.repeat(computed - query_start[:-1], chunks),
            query_start=query_start,
            page_tables=np.ascontiguousarray(self._page_tables[slots, :width]),
            sample_rows=np.array([query_start[i] + plan.chunks[i] - 1 + ahead for i, ahead in sampled], np.int32),
            sampling=self._sampling([(plan.sequences[i], ahead) for i, ahead in sampled]),
        )

    def _refresh(self, seq: Sequence) -> None:
        """Bring the columns of the sequence's slot up to date."""
        slot = seq.slot
        if self._owner[slot] is not seq.held:  # a new object with every admission
            self._owner[slot] = seq.held
            self._num_pages[slot] = 0
            self._set_parameters(seq)
        filled, pages = self._num_pages[slot], seq.held.pages
        if filled < len(pages):
            self._page_tables[slot, filled : len(pages)] = pages[filled:]
            self._num_pages[slot] = len(pages)

    def _set_parameters(self, seq: Sequence) -> None:
        slot, params = seq.slot, seq.request.params
        self._temperature[slot] = params.temperature
        self._top_k[slot] = max(params.top_k, 0)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = (params.seed or 0) & (2**64 - 1)
        self._num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._repetition[slot] = params.repetition_penalty
        self._presence[slot] = params.presence_penalty
        self._frequency[slot] = params.frequency_penalty
        self._penalised[slot] = params.penalised
        self._biased[slot] = bool(params.logit_bias) or params.min_tokens > 0

    def _sampling(self, rows: list[tuple[Sequence, int]]) -> SamplingBatch:
        """How to sample each of `rows`: the sequence's next token, or the one so many ahead of it."""
        sequences = [seq for seq, _ in rows]
        slots = np.array([seq.slot for seq in sequences], np.intp)
        outputs = np.array([seq.num_outputs + ahead for seq, ahead in rows], np.int64)
        penalised, biased = self._penalised[slots], self._biased[slots]
        histories = [seq.tokens if penalised[r] else _NO_TOKENS for r, seq in enumerate(sequences)]
        biases = [_bias(seq) if biased[r] else _NO_BIAS for r, seq in enumerate(sequences)]
        return SamplingBatch(
            temperature=self._temperature[slots],
            top_k=self._top_k[slots],
            top_p=self._top_p[slots],
            min_p=self._min_p[slots],
            seeds=self._seeds[slots],
            positions=outputs,
            num_logprobs=self._num_logprobs[slots],
            repetition=self._repetition[slots],
            presence=self._presence[slots],
            frequency=self._frequency[slots],
            history=np.frombuffer(b"".join(histories), np.int32),
            history_start=_starts(histories),
            history_outputs=np.where(penalised, outputs, 0).astype(np.int32),
            bias_tokens=np.array([token for row in biases for token in row], np.int32),
            bias_values=np.array([value for row in biases for value in row.values()], np.float32),
            bias_start=_starts(biases),
        )


def _gather_tokens(plan: StepPlan) -> np.ndarray:
    chunks = []
    for i, (seq, chunk) in enumerate(zip(plan.sequences, plan.chunks, strict=True)):
        chunks.append(seq.tokens[seq.num_computed : seq.num_computed + chunk])
        if i in plan.guesses:
            chunks.append(plan.guesses[i])
    return np.frombuffer(b"".join(chunks), np.int32)


def _bias(seq: Sequence) -> dict[int, float]:
    """What is added to the next token's logits: logit_bias, and a ban on ending before min_tokens."""
    params = seq.request.params
    bias = dict(params.logit_bias or {})
    if seq.num_outputs < params.min_tokens:
        bias.update(dict.fromkeys(seq.stop_tokens, -math.inf))
    return bias


def _starts(rows: list[Any]) -> np.ndarray:
    """Where each of the rows begins, and the last one ends, when they lie one after another."""
    starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    return starts
