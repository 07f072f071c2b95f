"""Turns a StepPlan into the flat arrays of a StepBatch.

What does not change from step to step lives in columns, a row per running sequence (its slot), so that a step gathers
with a few numpy calls instead of touching every parameter of every sequence in Python; and a step of the same sequences
as the last one does not even that. Of a sequence that decodes, Python reads three things: its slot, how much of it is
computed, and its last token.
"""

import math
from array import array
from operator import attrgetter
from typing import Any

import numpy as np

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.kv import SequencePages

from .scheduler import StepPlan
from .sequence import Sequence

_NOTHING: "array[int]" = array("i")
_NO_BIAS: dict[int, float] = {}
_NO_TOKENS, _NO_VALUES = np.zeros(0, np.int32), np.zeros(0, np.float32)

_slot, _num_computed = attrgetter("slot"), attrgetter("num_computed")


class BatchBuilder:
    """Columns for `max_running` slots and page tables of `max_pages` entries each; pages of `page_size` tokens."""

    def __init__(self, max_running: int, max_pages: int, page_size: int):
        n = max_running
        self._page_size = page_size
        self._owner: list[SequencePages | None] = [None] * n
        self._num_pages = np.zeros(n, np.int32)  # entries of the page table that are filled in
        self._page_tables = np.zeros((n, max_pages), np.int32)
        self._num_prompt = np.zeros(n, np.int32)
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
        self._penalized = np.zeros(n, bool)
        self._biased_until = np.zeros(n, np.int32)  # outputs until which something is added to its logits
        self._gathered: dict[str, np.ndarray] = {}  # parameters of the last step's rows,
        self._gathered_slots: np.ndarray | None = None  # which had these slots

    def build(self, plan: StepPlan) -> StepBatch:
        count = len(plan.sequences)
        for seq in plan.sequences[plan.num_decoding :]:  # in its first step a sequence is never among the decoding
            self._move_in(seq)
        slots = np.fromiter(map(_slot, plan.sequences), np.intp, count)
        computed = np.fromiter(map(_num_computed, plan.sequences), np.int32, count)
        chunks = np.array(plan.chunks, np.int32)
        guesses = np.zeros(count, np.int32)
        for i, guessed in plan.drafts.items():
            guesses[i] = len(guessed)
        rows = chunks + guesses
        query_start = np.zeros(count + 1, np.int32)
        np.cumsum(rows, out=query_start[1:])
        num_pages = -(-(computed + rows) // self._page_size)
        for i in np.flatnonzero(num_pages > self._num_pages[slots]).tolist():
            self._enter_pages(plan.sequences[i])
        owner, ahead = _sampled_rows(plan, guesses)
        ends = computed + chunks
        return StepBatch(
            tokens=_gather_tokens(plan),
            positions=np.arange(query_start[-1], dtype=np.int32) + np.repeat(computed - query_start[:-1], rows),
            query_start=query_start,
            page_tables=np.ascontiguousarray(self._page_tables[slots, : num_pages.max()]),
            sample_rows=((query_start[:-1] + chunks - 1)[owner] + ahead).astype(np.int32),
            sampling=self._sampling(
                plan.sequences, owner, slots[owner], outputs=(ends - self._num_prompt[slots])[owner] + ahead
            ),
        )

    def _move_in(self, seq: Sequence) -> None:
        """Set the columns of the sequence's slot, unless it has had it before."""
        slot, params, column = seq.slot, seq.request.params, self._parameters
        if self._owner[slot] is seq.held:  # a new object with every admission
            return
        self._owner[slot] = seq.held
        self._num_pages[slot] = 0
        self._num_prompt[slot] = seq.num_prompt
        column["temperature"][slot] = params.temperature
        column["top_k"][slot] = max(params.top_k, 0)
        column["top_p"][slot] = params.top_p
        column["min_p"][slot] = params.min_p
        column["seeds"][slot] = (params.seed or 0) & (2**64 - 1)
        column["num_logprobs"][slot] = -1 if params.logprobs is None else params.logprobs
        column["repetition"][slot] = params.repetition_penalty
        column["presence"][slot] = params.presence_penalty
        column["frequency"][slot] = params.frequency_penalty
        self._penalized[slot] = params.penalized
        self._biased_until[slot] = 2**31 - 1 if params.logit_bias else params.min_tokens
        self._gathered_slots = None

    def _enter_pages(self, seq: Sequence) -> None:
        """Write the pages that the sequence got since the last time into its page table."""
        filled, pages = self._num_pages[seq.slot], seq.held.pages
        self._page_tables[seq.slot, filled : len(pages)] = pages[filled:]
        self._num_pages[seq.slot] = len(pages)

    def _sampling(
        self, sequences: list[Sequence], owner: np.ndarray, slots: np.ndarray, outputs: np.ndarray
    ) -> SamplingBatch:
        """How to sample each row: for sequences[owner[r]], in slots[r], its output at position outputs[r]."""
        if self._gathered_slots is None or not np.array_equal(slots, self._gathered_slots):
            self._gathered = {name: column[slots] for name, column in self._parameters.items()}
            self._gathered_slots = slots
        return SamplingBatch(
            positions=outputs,
            **self._gathered,
            **_histories(sequences, owner, self._penalized[slots], outputs),
            **_biases(sequences, owner, self._biased_until[slots] > outputs),
        )


def _sampled_rows(plan: StepPlan, guesses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row to be sampled: which sequence it belongs to, and how many guesses come before it."""
    samples = guesses + 1
    for i in range(plan.num_decoding, len(plan.sequences)):
        if not plan.ends(i):
            samples[i] = 0
    owner = np.repeat(np.arange(len(samples)), samples)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(samples) - samples, samples)


def _gather_tokens(plan: StepPlan) -> np.ndarray:
    alone = 0 if plan.drafts else plan.num_decoding  # so many have one token and nothing else
    tokens = array("i", [seq.tokens[-1] for seq in plan.sequences[:alone]])
    for i in range(alone, len(plan.sequences)):
        seq = plan.sequences[i]
        tokens += seq.tokens[seq.num_computed : seq.num_computed + plan.chunks[i]]
        tokens += plan.drafts.get(i, _NOTHING)
    return np.frombuffer(tokens, np.int32)


def _histories(
    sequences: list[Sequence], owner: np.ndarray, penalized: np.ndarray, outputs: np.ndarray
) -> dict[str, np.ndarray]:
    """What penalties look back at, if any row has one: fields of SamplingBatch."""
    if not penalized.any():
        zeros = np.zeros(len(owner) + 1, np.int32)
        return {"history": _NO_TOKENS, "history_start": zeros, "history_outputs": zeros[1:]}
    histories = [sequences[i].tokens if wanted else _NOTHING for i, wanted in zip(owner, penalized, strict=True)]
    return {
        "history": np.frombuffer(b"".join(histories), np.int32),
        "history_start": _starts(histories),
        "history_outputs": np.where(penalized, outputs, 0).astype(np.int32),
    }


def _biases(sequences: list[Sequence], owner: np.ndarray, biased: np.ndarray) -> dict[str, np.ndarray]:
    """What is added to logits, if any row wants that: fields of SamplingBatch."""
    if not biased.any():
        return {"bias_tokens": _NO_TOKENS, "bias_values": _NO_VALUES, "bias_start": np.zeros(len(owner) + 1, np.int32)}
    biases = [_bias(sequences[i]) if wanted else _NO_BIAS for i, wanted in zip(owner, biased, strict=True)]
    return {
        "bias_tokens": np.array([token for row in biases for token in row], np.int32),
        "bias_values": np.array([value for row in biases for value in row.values()], np.float32),
        "bias_start": _starts(biases),
    }


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
