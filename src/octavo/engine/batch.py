"""BatchBuilder: turns a StepPlan into the flat arrays of a StepBatch.

Values that do not change from step to step are kept in columns with one row (slot) per running sequence. So a step
gathers them with a few numpy calls, and a step with the same sequences as the one before gathers no parameters at all.
For a decoding sequence, Python reads only its slot, num_computed and last token.
"""

import math
from array import array
from operator import attrgetter
from typing import Any

import numpy as np

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.kv import PageTable

from .constraints import masks_of
from .pooling import pooling_batch
from .scheduler import StepPlan
from .sequence import Sequence
from .token_masks import restrict

CERTAIN = 1e30  # a bias that no other logit exceeds

_EMPTY: "array[int]" = array("i")
_NO_BIAS: dict[int, float] = {}
_NO_TOKENS, _NO_VALUES, _NO_WORDS = np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.uint32)

_slot, _num_computed = attrgetter("slot"), attrgetter("num_computed")


class BatchBuilder:
    """Builds the batches of an engine.

    Args:
        max_running: maximum number of running sequences, which is the number of slots.
        max_pages: maximum number of pages of a sequence.
        page_size: tokens per page.
        hidden_size: elements of a hidden state.
    """

    def __init__(self, max_running: int, max_pages: int, page_size: int, hidden_size: int):
        n = max_running
        self._page_size, self._hidden_size = page_size, hidden_size
        self._table_of: list[PageTable | None] = [None] * n  # page table of the sequence whose columns are filled in
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
        self._biased_until = np.zeros(n, np.int32)  # number of outputs until which its logits are biased
        self._restricted = np.zeros(n, bool)  # whether it has allowed tokens, or a budget of reasoning
        self._gathered: dict[str, np.ndarray] = {}  # parameters of the last step's rows
        self._gathered_slots: np.ndarray | None = None  # the slots of those rows

    def build(self, plan: StepPlan) -> StepBatch:
        """Return the batch of a plan, which must have sequences."""
        count = len(plan.sequences)
        for seq in plan.sequences[plan.num_decoding :]:  # a sequence is not decoding in its first step
            self._fill_columns(seq)
        slots = np.fromiter(map(_slot, plan.sequences), np.intp, count)
        computed = np.fromiter(map(_num_computed, plan.sequences), np.int32, count)
        chunks = np.array(plan.chunks, np.int32)
        num_drafts = np.zeros(count, np.int32)
        for i, draft in plan.drafts.items():
            num_drafts[i] = len(draft)
        rows = chunks + num_drafts
        query_start = np.zeros(count + 1, np.int32)
        np.cumsum(rows, out=query_start[1:])
        num_pages = -(-(computed + rows) // self._page_size)
        for i in np.flatnonzero(num_pages > self._num_pages[slots]).tolist():
            self._extend_page_table(plan.sequences[i])
        owner, ahead = _sampled_rows(plan, num_drafts)
        ends, places = computed + chunks, slots[owner]
        return StepBatch(
            tokens=_gather_tokens(plan),
            positions=np.arange(query_start[-1], dtype=np.int32) + np.repeat(computed - query_start[:-1], rows),
            query_start=query_start,
            page_tables=np.ascontiguousarray(self._page_tables[slots, : num_pages.max()]),
            sample_rows=((query_start[:-1] + chunks - 1)[owner] + ahead).astype(np.int32),
            sampling=self._sampling(
                plan.sequences, owner, places, (ends - self._num_prompt[slots])[owner] + ahead, masks_of(plan)
            ),
            pooling=pooling_batch(plan, query_start, owner, self._hidden_size),
            places=places,
        )

    def _fill_columns(self, seq: Sequence) -> None:
        """Set the columns of a sequence's slot, unless they are filled in for this sequence already."""
        slot, params, column = seq.slot, seq.request.params, self._parameters
        if self._table_of[slot] is seq.page_table:  # whatever changes its entries makes a new page table
            return
        self._table_of[slot] = seq.page_table
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
        always = params.logit_bias or seq.request.banned
        self._biased_until[slot] = 2**31 - 1 if always else params.min_tokens
        self._restricted[slot] = seq.allowed is not None or seq.thinking is not None
        self._gathered_slots = None

    def _extend_page_table(self, seq: Sequence) -> None:
        """Copy the pages that a sequence got since the last step into its row of page tables."""
        filled, pages = self._num_pages[seq.slot], seq.page_table.pages
        self._page_tables[seq.slot, filled : len(pages)] = pages[filled:]
        self._num_pages[seq.slot] = len(pages)

    def _sampling(
        self,
        sequences: list[Sequence],
        owner: np.ndarray,
        slots: np.ndarray,
        outputs: np.ndarray,
        masks: list[bytes] | None,
    ) -> SamplingBatch:
        """Return the SamplingBatch. Row r is output number outputs[r] of sequences[owner[r]], which has slots[r].

        A negative number means a token of the prompt, whose logprob is wanted.
        """
        if self._gathered_slots is None or not np.array_equal(slots, self._gathered_slots):
            self._gathered = {name: column[slots] for name, column in self._parameters.items()}
            self._gathered_slots = slots
        biased = self._biased_until[slots] > outputs
        if self._restricted[slots].any():
            masks, forced = restrict(masks, sequences, owner, outputs)
            biased &= ~forced
        if (scored := outputs < 0).any():
            return self._scoring(sequences, owner, slots, outputs, scored, biased, masks)
        return SamplingBatch(
            positions=outputs,
            **self._gathered,
            **_histories(sequences, owner, self._penalized[slots], outputs),
            **_biases([sequences[i] for i in owner], biased),
            **_masks(masks, len(owner)),
        )

    def _scoring(
        self,
        sequences: list[Sequence],
        owner: np.ndarray,
        slots: np.ndarray,
        outputs: np.ndarray,
        scored: np.ndarray,
        biased: np.ndarray,
        masks: list[bytes] | None,
    ) -> SamplingBatch:
        """Return the SamplingBatch of a step with rows, `scored`, that give logprobs of prompt tokens.

        These rows take the prompt's token, by a bias that makes it the likeliest one. Their logprobs are those of the
        logits before biases.
        """
        parameters = dict(self._gathered)
        for name, value in (("temperature", 0), ("repetition", 1), ("presence", 0), ("frequency", 0)):
            parameters[name] = np.where(scored, value, parameters[name]).astype(np.float32)
        wanted = [sequences[i].request.params.prompt_logprobs or 0 for i in owner]
        parameters["num_logprobs"] = np.where(scored, wanted, parameters["num_logprobs"]).astype(np.int32)
        targets = [
            sequences[i].tokens[sequences[i].num_prompt + output] if output < 0 else None
            for i, output in zip(owner, outputs.tolist(), strict=True)
        ]
        return SamplingBatch(
            positions=outputs,
            **parameters,
            **_histories(sequences, owner, self._penalized[slots] & ~scored, outputs),
            **_biases([sequences[i] for i in owner], biased | scored, targets),
            **_masks(masks, len(owner)),
        )


def _sampled_rows(plan: StepPlan, num_drafts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each row to be sampled, the index of its sequence, and its distance from the last row of the chunk.

    Rows of draft tokens have positive distances. Rows before the last one have negative distances; they give logprobs
    of the prompt.
    """
    samples, first = num_drafts + 1, np.zeros_like(num_drafts)
    for i in range(plan.num_decoding, len(plan.sequences)):
        scored, completes = plan.sequences[i].num_scored(plan.chunks[i]), plan.samples(i)
        samples[i] = samples[i] * completes + scored
        first[i] = (not completes) - scored
    owner = np.repeat(np.arange(len(samples)), samples)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(samples) - samples - first, samples)


def _gather_tokens(plan: StepPlan) -> np.ndarray:
    single = 0 if plan.drafts else plan.num_decoding  # number of sequences with one token to compute and no draft
    tokens = array("i", [seq.tokens[-1] for seq in plan.sequences[:single]])
    for i in range(single, len(plan.sequences)):
        seq = plan.sequences[i]
        tokens += seq.tokens[seq.num_computed : seq.num_computed + plan.chunks[i]]
        tokens += plan.drafts.get(i, _EMPTY)
    return np.frombuffer(tokens, np.int32)


def _histories(
    sequences: list[Sequence], owner: np.ndarray, penalized: np.ndarray, outputs: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the fields of SamplingBatch for penalties: the tokens so far of each row with a penalty."""
    if not penalized.any():
        zeros = np.zeros(len(owner) + 1, np.int32)
        return {"history": _NO_TOKENS, "history_start": zeros, "history_outputs": zeros[1:]}
    histories = [sequences[i].tokens if wanted else _EMPTY for i, wanted in zip(owner, penalized, strict=True)]
    return {
        "history": np.frombuffer(b"".join(histories), np.int32),
        "history_start": _starts(histories),
        "history_outputs": np.where(penalized, outputs, 0).astype(np.int32),
    }


def _biases(
    sequences: list[Sequence], biased: np.ndarray, targets: list[int | None] | None = None
) -> dict[str, np.ndarray]:
    """Return the fields of SamplingBatch for biases, which are added to the logits of some rows.

    Args:
        sequences: that of each row.
        targets: the token that each row must take; None for any.
    """
    if not biased.any():
        return {"bias_tokens": _NO_TOKENS, "bias_values": _NO_VALUES, "bias_start": np.zeros(len(biased) + 1, np.int32)}
    biases = [_bias(seq) if wanted else _NO_BIAS for seq, wanted in zip(sequences, biased, strict=True)]
    if targets is not None:
        biases = [bias if target is None else {target: CERTAIN} for bias, target in zip(biases, targets, strict=True)]
    return {
        "bias_tokens": np.array([token for row in biases for token in row], np.int32),
        "bias_values": np.array([value for row in biases for value in row.values()], np.float32),
        "bias_start": _starts(biases),
    }


def _masks(masks: list[bytes] | None, rows: int) -> dict[str, np.ndarray]:
    """Return the fields of SamplingBatch for masks."""
    if masks is None:
        return {"masks": _NO_WORDS, "mask_start": np.zeros(rows + 1, np.int32)}
    starts = np.zeros(rows + 1, np.int32)
    np.cumsum([len(mask) // 4 for mask in masks], out=starts[1:])
    return {"masks": np.frombuffer(b"".join(masks), np.uint32), "mask_start": starts}


def _bias(seq: Sequence) -> dict[int, float]:
    """Return the biases of a sequence's next logits: logit_bias, and -inf for banned tokens."""
    params = seq.request.params
    bias = dict(params.logit_bias or {})
    if seq.num_outputs < params.min_tokens:
        bias.update(dict.fromkeys(seq.stop_tokens, -math.inf))
    for *before, last in seq.request.banned:
        if seq.ends_with(before):
            bias[last] = -math.inf
    return bias


def _starts(rows: list[Any]) -> np.ndarray:
    """Return the offsets of the concatenated rows, and the end of the last one: int32 [len(rows) + 1]."""
    starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    return starts
