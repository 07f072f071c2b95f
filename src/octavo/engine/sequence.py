"""Sequence: one request that the engine is working on."""

import sys
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.kv import PageTable, Prefetch, Prefix
from octavo.params import SamplingParams

from .messages import EngineRequest, Pooling, TokenLogprobs
from .thinking import ThinkingBudget

if TYPE_CHECKING:
    import numpy as np

    from octavo.kv.store.reading import Lookup
    from octavo.text.grammars import Matcher


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and its progress.

    Attributes:
        order: number of the request in order of arrival at this engine, from 0.
        stop_tokens: tokens that end the sequence: end-of-sequence tokens and stop_token_ids.
        tokens: prompt and output; the last may be negative: not known yet (`run_ahead`).
        prefix: the page keys of `tokens`.
        max_tokens: maximum tokens of prompt and output together.
        draft_limit: maximum number of draft tokens in a step.
        arrival: time of arrival on the engine's clock, in seconds.
        num_computed: number of `tokens` whose K and V are in the pages of `page_table`, or will be when the launched
            steps are computed.
        ahead_from: the num_computed before the first of these steps; None if there is none.
        awaited: whether a launched step computes tokens of it, and its next step cannot be planned before the result.
        cached_tokens: tokens found in the prefix cache at the first admission.
        started: time of the first step with tokens of this sequence, on the engine's clock; None before it.
        time_in_queue: seconds from arrival to `started`, from the end of the prompt until the first output has them.
        preemptions: number of preemptions.
        prefetch: pages that are being fetched while the sequence waits.
        lookup: which pages the shared store has; None if it was not asked.
        short_chunks: number of further chunks that are short while the store is late.
        place: (rank, order), by which sequences are sorted; the rank comes from the policy.
        slot: row of the batch columns while the sequence runs; -1 while it waits.
        admitted: whether the sequence has been admitted before; if it waits, it was preempted.
        aborted: whether the sequence was removed or has failed.
        scores: the logprobs of the prompt's tokens so far, from its second token on, in parts; None if the request does
            not want any, or has got them.
        scored: number of tokens whose logprobs are in `scores`.
        matcher: the position in the grammar of structured outputs, behind the last token; None without a grammar.
        ready: whether the next token may be sampled: False while a thread uses the matcher to compute its mask.
        draft: draft tokens that the grammar allows, for a sequence with a grammar.
        masks: the tokens that the grammar allows next, and those that it allows after each token of `draft`.
        grammar_error: the reason why the grammar cannot be followed any further.
        pooling: what is wanted of the prompt, if not a continuation.
        sums: the sum of the hidden states of the first `num_pooled` tokens, or the hidden state of the last token, in
            float64; None if there is none yet.
        label_logits: the logits of the labels of `pooling`.
        allowed: the mask of allowed_token_ids; None if all tokens are allowed.
        thinking: the limit of the model's reasoning; None if there is none.
        tenant: the same object for all sequences of a tenant, so that counting them is fast.
    """

    request: EngineRequest
    order: int
    stop_tokens: frozenset[int]
    tokens: "array[int]"
    prefix: Prefix
    num_prompt: int
    max_tokens: int
    draft_limit: int = 0
    arrival: float = 0.0
    num_computed: int = 0
    ahead_from: int | None = None
    awaited: bool = False
    cached_tokens: int = 0
    started: float | None = None
    time_in_queue: float | None = None
    preemptions: int = 0
    page_table: PageTable = field(init=False)
    tenant: str = field(init=False)
    pooling: Pooling | None = field(init=False)
    sums: "np.ndarray | None" = None
    num_pooled: int = 0
    label_logits: "np.ndarray | None" = None
    prefetch: Prefetch | None = None
    lookup: "Lookup | None" = None
    short_chunks: int = 2
    scores: list[TokenLogprobs] | None = None
    scored: int = 0
    place: tuple[float, int] = (0.0, 0)
    slot: int = -1
    admitted: bool = False
    aborted: bool = False
    matcher: "Matcher | None" = None
    ready: bool = True
    draft: "array[int]" = field(default_factory=lambda: array("i"))
    masks: list[bytes] = field(default_factory=list)
    grammar_error: str | None = None
    allowed: bytes | None = None
    thinking: ThinkingBudget | None = None

    def __post_init__(self) -> None:
        self.page_table = PageTable(self.prefix)
        self.tenant = sys.intern(self.request.tenant)
        self.pooling = self.request.pooling

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt(self) -> list[int]:
        return self.request.prompt

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def ttft_target(self) -> float | None:
        return self.request.ttft_target

    @property
    def is_looked_up_now(self) -> bool:
        """Return whether the shared store has not answered yet which pages it has, and may still do so in time."""
        return self.lookup is not None and not self.lookup.is_done

    @property
    def awaits_pages(self) -> bool:
        """Return whether pages may still come from the shared store for a sequence that is being computed."""
        fetch = self.page_table.fetch
        return (self.lookup is not None and not self.lookup.is_answered) or (fetch is not None and bool(fetch.left))

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def unscored(self) -> int | None:
        """Return the first position whose logits give a missing logprob of the prompt; None if none is missing.

        The logits at a position give the logprobs of the token that follows.
        """
        return self.scored if self.scores is not None and self.scored < self.num_prompt - 1 else None

    @property
    def max_cached(self) -> int | None:
        """Return the number of tokens whose pages may be taken from the cache; None for no limit.

        A cached page hides the logits and the hidden states of its tokens. A sequence that is not ready must have a
        token to compute before the last one, so that it can be part of a step.
        """
        if self.pooling is not None and self.pooling.hidden == "mean":
            return self.num_pooled
        unscored = self.unscored
        return unscored if self.ready or unscored is not None else len(self.tokens) - 2

    def num_to_pool(self, chunk: int) -> int:
        """Return how many of the last rows of the next `chunk` tokens have hidden states that are wanted."""
        hidden, end = self.pooling and self.pooling.hidden, self.num_computed + chunk
        if hidden == "mean":
            return max(0, end - max(self.num_computed, self.num_pooled))
        return int(hidden == "last" and end == len(self.tokens))

    def num_scored(self, chunk: int) -> int:
        """Return how many missing logprobs of the prompt the computation of the next `chunk` tokens gives."""
        first = self.unscored
        return 0 if first is None else max(0, min(self.num_computed + chunk, self.num_prompt - 1) - first)

    def run_ahead(self, chunk: int, samples: bool) -> None:
        """Count the `chunk` tokens of a launched step as computed; if it samples, append what stands for the token.

        That is -1 - slot: the backend keeps the token in this place (StepBatch.places).
        """
        if self.ahead_from is None:
            self.ahead_from = self.num_computed
        self.num_computed += chunk
        if samples:
            self.tokens.append(-1 - self.slot)

    @property
    def num_draft_tokens(self) -> int:
        """Return the number of draft tokens to try now; 0 if sampling depends on the tokens before."""
        params = self.request.params
        depends = params.penalized or self.request.banned or self.thinking or self.num_outputs < params.min_tokens
        return 0 if depends else self.draft_limit

    def ends_with(self, tokens: list[int]) -> bool:
        """Return whether the output ends with `tokens`."""
        count = len(tokens)
        if count == 0 or count > self.num_outputs or tokens[-1] != self.tokens[-1]:
            return count == 0
        return self.tokens[-count:].tolist() == tokens
