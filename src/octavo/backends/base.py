"""Backend: the interface to the hardware. Defines the batch of one step and the result that a backend must compute."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from octavo.model.spec import DecoderSpec
from octavo.weights.tensor import Parameter

Progress = Callable[[int, int], None]  # called as work is done: progress(done bytes, total bytes)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How to sample each of R rows. Row r is output number `positions[r]` of its request.

    logits → + bias, repetition / presence / frequency penalties over `history` → mask → greedy if temperature is 0,
    else / temperature → top_k → top_p → min_p → draw with Philox4x32-10 (Salmon et al., 2011), key = `seeds[r]`,
    counter = `positions[r]`. Ties go to the lower token id. Logprobs are of the raw logits, in nats.
    """

    temperature: np.ndarray  # float32 [R]
    top_k: np.ndarray  # int32 [R], 0: all
    top_p: np.ndarray  # float32 [R], 1: all
    min_p: np.ndarray  # float32 [R], 0: all
    seeds: np.ndarray  # uint64 [R]
    positions: np.ndarray  # int64 [R]
    num_logprobs: np.ndarray  # int32 [R], -1: none, 0: of the sampled token only, n: of the n likeliest tokens too
    repetition: np.ndarray  # float32 [R], 1: none; over prompt and output
    presence: np.ndarray  # float32 [R], 0: none; over output
    frequency: np.ndarray  # float32 [R], 0: none; over output
    history: np.ndarray  # int32 [H], prompts and outputs of the rows that have a penalty, concatenated
    history_start: np.ndarray  # int32 [R + 1]; row r's history is history[start[r]:start[r + 1]], empty if no penalty
    history_outputs: np.ndarray  # int32 [R], how many of its last tokens are outputs
    bias_tokens: np.ndarray  # int32 [B], tokens of logit_bias and of bans, concatenated by row
    bias_values: np.ndarray  # float32 [B]; -inf bans
    bias_start: np.ndarray  # int32 [R + 1]
    masks: np.ndarray  # uint32 [M], bit t % 32 of word t // 32 allows token t; tokens past a row's last word are banned
    mask_start: np.ndarray  # int32 [R + 1]; row r's mask is masks[start[r]:start[r + 1]]; if empty, all are allowed

    @classmethod
    def greedy(cls, rows: int) -> "SamplingBatch":
        """Return parameters that take the likeliest token of each of `rows` rows, without logprobs."""
        return cls(
            temperature=np.zeros(rows, np.float32),
            top_k=np.zeros(rows, np.int32),
            top_p=np.ones(rows, np.float32),
            min_p=np.zeros(rows, np.float32),
            seeds=np.zeros(rows, np.uint64),
            positions=np.zeros(rows, np.int64),
            num_logprobs=np.full(rows, -1, np.int32),
            repetition=np.ones(rows, np.float32),
            presence=np.zeros(rows, np.float32),
            frequency=np.zeros(rows, np.float32),
            history=np.zeros(0, np.int32),
            history_start=np.zeros(rows + 1, np.int32),
            history_outputs=np.zeros(rows, np.int32),
            bias_tokens=np.zeros(0, np.int32),
            bias_values=np.zeros(0, np.float32),
            bias_start=np.zeros(rows + 1, np.int32),
            masks=np.zeros(0, np.uint32),
            mask_start=np.zeros(rows + 1, np.int32),
        )


@dataclass(frozen=True, slots=True)
class PoolingBatch:
    """What pooled requests want of a step: P sums of hidden states, and the logits of L labels.

    Sum p: `sums[p]` plus the hidden states of rows first[p] to end[p] - 1, added in float64 in order of position, so
    that it is the same for any division into steps. A row's hidden state is the output of the final norm in float32.
    """

    first: np.ndarray  # int32 [P]
    end: np.ndarray  # int32 [P]
    sums: np.ndarray  # float64 [P, hidden]: those of earlier steps, or zeros
    label_rows: np.ndarray  # int32 [L], indices into the R sampled rows
    label_tokens: np.ndarray  # int32 [L]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step: N rows (tokens) of S sequences, concatenated by sequence, each sequence's rows in order of position.

    Sequence s has rows query_start[s]:query_start[s + 1]; the row at position p reads and writes the page
    page_tables[s, p // page_size] at slot p % page_size. Entries of a page table past a sequence's end are ignored.

    A backend that `runs_ahead` keeps the sampled token of row r in place `places[r]` of its own memory, and the token
    -1 - k stands for the one that an earlier step has put in place k. If that step has failed to sample it, the rows of
    its sequence may have any result.
    """

    tokens: np.ndarray  # int32 [N]
    positions: np.ndarray  # int32 [N], from 0
    query_start: np.ndarray  # int32 [S + 1]
    page_tables: np.ndarray  # int32 [S, P], C-contiguous
    sample_rows: np.ndarray  # int32 [R], rows (indices into N) whose next token is wanted
    sampling: SamplingBatch
    pooling: PoolingBatch | None = None
    places: np.ndarray | None = None  # integers [R], from 0 to max_batch_size - 1; None: no token is kept


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step, for each of its R sampled rows.

    The logprobs, ranks and top_* are None if no row wants logprobs. top_* have K = max(num_logprobs) columns, likeliest
    first; a row that wants fewer uses the first of them. `sums` and `label_logits` are None without a PoolingBatch.
    """

    tokens: np.ndarray  # int32 [R]
    logprobs: np.ndarray | None = None  # float32 [R]; NaN in rows that want none
    ranks: np.ndarray | None = None  # int32 [R], 1: the sampled token was the likeliest
    top_tokens: np.ndarray | None = None  # int32 [R, K]
    top_logprobs: np.ndarray | None = None  # float32 [R, K]
    sums: np.ndarray | None = None  # float64 [P, hidden]
    label_logits: np.ndarray | None = None  # float32 [L], raw logits

    def result(self) -> "StepResult":
        """Return itself: a result is what a launch returns that has computed the step at once (`Pending`)."""
        return self


class Pending(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Wait until the step is computed, and return its result. To be called once."""
        ...


@dataclass(frozen=True)
class Footprint:
    """What a backend runs for a model, and the memory that it takes.

    Attributes:
        kernels: name of the kernels, for people: an instruction set, or PyTorch's device.
        weight_bytes: bytes of the weights in memory.
        page_bytes: bytes of one KV page, all layers together.
        step_bytes: bytes that steps take beside both, if the backend knows it.
    """

    kernels: str
    weight_bytes: int
    page_bytes: int
    step_bytes: int = 0


class Backend(Protocol):
    """One model on one device. One thread at a time calls its methods, except export_page and import_page.

    Only `launch`, `step` and `logits` may take long. Steps and `copy_page` are done in the order of their calls.

    A row's result must be bitwise the same for any other rows in the batch, any division of its prompt into chunks, and
    any pages allocated for it. (The torch backend, an oracle for tests, is exempt.)

    Attributes:
        page_size: tokens per KV page.
        page_bytes: bytes of one KV page, all layers together.
        arithmetic: identifies everything that determines a page's bits besides weights and page size: kernels,
            instruction set, recipe, dtypes.
        footprint: what runs, and the memory that it takes.
        runs_ahead: whether `launch` returns before the step is computed, so that another one may be launched meanwhile.
    """

    spec: DecoderSpec
    page_size: int
    page_bytes: int
    arithmetic: str
    footprint: Footprint
    runs_ahead: bool

    def allocate_kv(self, num_pages: int) -> None:
        """Allocate the KV pool. Raises OutOfMemory, whose message says how many pages would fit."""
        ...

    def export_page(self, page: int) -> np.ndarray:
        """Return a page's content, uint8 [page_bytes], read-only: a view of the pool if possible, otherwise a copy.

        Any thread may call this while the page is referenced and no launched step writes to it. The backend chooses the
        layout of the bytes; engines with the same fingerprint may import them. Raises ValueError if there is no such
        page.
        """
        ...

    def import_page(self, page: int, content: np.ndarray) -> None:
        """Write content from `export_page` into a page that no launched step writes to or needs. From any thread.

        Raises ValueError.
        """
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Copy the content of one page into another, between two steps, and before later exports and imports.

        Raises ValueError.
        """
        ...

    def launch(self, batch: StepBatch) -> Pending:
        """Begin to compute the forward pass and to sample. At most one earlier step may be without a result."""
        ...

    def step(self, batch: StepBatch) -> StepResult:
        """Compute the forward pass and sample, in one call with the GIL released: `launch` and `result`."""
        ...

    def logits(self, batch: StepBatch) -> np.ndarray:
        """Compute the same forward pass and return the raw logits of `sample_rows`, float32 [R, vocab]. For tests."""
        ...

    def close(self) -> None:
        """Free threads and memory, after the steps that were launched. No method may be called afterwards."""
        ...


class ComputesAtOnce:
    """The part of a Backend whose steps are computed by `step`, on the processor that launches them."""

    runs_ahead = False

    def launch(self, batch: StepBatch) -> StepResult:
        return self.step(batch)

    def step(self, batch: StepBatch) -> StepResult:
        raise NotImplementedError


class BackendFactory(Protocol):
    """The function that a backend package exports as `load`."""

    def __call__(
        self,
        spec: DecoderSpec,
        parameters: Mapping[str, Parameter],
        *,
        page_size: int,
        max_batch_tokens: int,
        max_batch_size: int,
        max_model_len: int,
        threads: int,
        dtype: str,
        quantization: str,
        device: str,
        progress: Progress,
        kv_cache_dtype: str = "bf16",
    ) -> Backend:
        """Pack `parameters`, compile `spec` and return the backend; allocate_kv must follow.

        Args:
            parameters: by the canonical names of model/decoder.py; each is read once.
            page_size: tokens per KV page.
            max_batch_tokens: maximum number of rows in a step.
            max_batch_size: maximum number of sampled rows in a step.
            quantization: format of the weights: "auto", "none", "8bit" or "4bit" (see EngineConfig).
            kv_cache_dtype: format of keys and values: "bf16" or "int8".

        Raises:
            ConfigError, OutOfMemory
        """
        ...
