"""Turns a StepPlan into the flat arrays of a StepBatch.

What does not change from step to step lives in columns, a row per running sequence (its slot), so that a step gathers
with a few numpy calls instead of touching every parameter of every sequence in Python; and a step of the same sequences
as the last one does not even that.
"""

import math
from array import array
from typing import Any

import numpy as np

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.kv import SequencePages

from .scheduler import StepPlan
from .sequence import Sequence

_NO_HISTORY: "array[int]" = array("i")
_NO_BIAS: dict[int, float] = {}
_NO_TOKENS, _NO_VALUES = np.zeros(0, np.int32), np.zeros(0, np.float32)


class BatchBuilder:
    """Columns for `max_running` slots and page tables of `max_pages` entries each; pages of `page_size` tokens."""

    def __init__(self, max_running: int, max_pages: int, page_size: int):
        n = max_running
        self._page_size = page_size
        self._owner: list[SequencePages | None] = [None] * n
        self._num_pages = [0] * n  # entries of the page table that are filled in
        self._page_tables = np.zeros((n, max_pages), np.int32)
        self._parameters: dict[str, np.ndarray] = {  # fields of SamplingBatch
            "temperature": np.zeros(n, np.float32),
            "top_k": np.zeros(n, np.int32),
            "top_p": np.ones(n, np.float32),
            "min_p": np.zeros(n, np.float32),
            "seeds": np.zeros(n, np.uint64),
            "num_logprobs": np.full(n, -1, np.int32),
            "repetition": np.ones(n, np.float32),
            "presence": np.zeros(n, np.float32),
            "frequency": np.zeros(n, np.float32),
        }
        self._gathered: dict[str, np.ndarray] = {}  # those of the last step's rows,
        self._gathered_slots: list[int] | None = None  # which had these slots

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
        slot, params, column = seq.slot, seq.request.params, self._parameters
        column["temperature"][slot] = params.temperature
        column["top_k"][slot] = max(params.top_k, 0)
        column["top_p"][slot] = params.top_p
        column["min_p"][slot] = params.min_p
        column["seeds"][slot] = (params.seed or 0) & (2**64 - 1)
        column["num_logprobs"][slot] = -1 if params.logprobs is None else params.logprobs
        column["repetition"][slot] = params.repetition_penalty
        column["presence"][slot] = params.presence_penalty
        column["frequency"][slot] = params.frequency_penalty
        self._gathered_slots = None

    def _sampling(self, rows: list[tuple[Sequence, int]]) -> SamplingBatch:
        """How to sample each of `rows`: the sequence's next token, or the one so many ahead of it."""
        outputs = np.array([seq.num_outputs + ahead for seq, ahead in rows], np.int64)
        sequences = [seq for seq, _ in rows]
        return SamplingBatch(
            positions=outputs,
            **self._gather_parameters([seq.slot for seq in sequences]),
            **_histories(sequences, outputs),
            **_biases(sequences),
        )

    def _gather_parameters(self, slots: list[int]) -> dict[str, np.ndarray]:
        if slots != self._gathered_slots:
            index = np.array(slots, np.intp)
            self._gathered = {name: column[index] for name, column in self._parameters.items()}
            self._gathered_slots = slots
        return self._gathered


def _gather_tokens(plan: StepPlan) -> np.ndarray:
    chunks = []
    for i, (seq, chunk) in enumerate(zip(plan.sequences, plan.chunks, strict=True)):
        chunks.append(seq.tokens[seq.num_computed : seq.num_computed + chunk])
        if i in plan.guesses:
            chunks.append(plan.guesses[i])
    return np.frombuffer(b"".join(chunks), np.int32)


def _histories(sequences: list[Sequence], outputs: np.ndarray) -> dict[str, np.ndarray]:
    """What penalties look back at, if any row has one: fields of SamplingBatch."""
    penalised = [seq.request.params.penalised for seq in sequences]
    if not any(penalised):
        zeros = np.zeros(len(sequences) + 1, np.int32)
        return {"history": _NO_TOKENS, "history_start": zeros, "history_outputs": zeros[1:]}
    histories = [seq.tokens if wanted else _NO_HISTORY for seq, wanted in zip(sequences, penalised, strict=True)]
    return {
        "history": np.frombuffer(b"".join(histories), np.int32),
        "history_start": _starts(histories),
        "history_outputs": np.where(penalised, outputs, 0).astype(np.int32),
    }


def _biases(sequences: list[Sequence]) -> dict[str, np.ndarray]:
    """What is added to logits, if any row wants that: fields of SamplingBatch."""
    biases = [_bias(seq) for seq in sequences]
    if not any(biases):
        return {"bias_tokens": _NO_TOKENS, "bias_values": _NO_VALUES, "bias_start": np.zeros(len(biases) + 1, np.int32)}
    return {
        "bias_tokens": np.array([token for row in biases for token in row], np.int32),
        "bias_values": np.array([value for row in biases for value in row.values()], np.float32),
        "bias_start": _starts(biases),
    }


def _bias(seq: Sequence) -> dict[int, float]:
    """What is added to the next token's logits: logit_bias, and a ban on ending before min_tokens."""
    params = seq.request.params
    if not params.logit_bias and seq.num_outputs >= params.min_tokens:
        return _NO_BIAS
    bias = dict(params.logit_bias or {})
    if seq.num_outputs < params.min_tokens:
        bias.update(dict.fromkeys(seq.stop_tokens, -math.inf))
    return bias


def _starts(rows: list[Any]) -> np.ndarray:
    """Where each of the rows begins, and the last one ends, when they lie one after another."""
    starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    return starts
