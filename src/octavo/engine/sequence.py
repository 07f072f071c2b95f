"""One sequence that the engine is working on."""

import sys
from array import array
from dataclasses import dataclass, field

from octavo.kv import Prefetch, Prefix, SequencePages

from .messages import EngineRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """A request with its state. `tokens`: prompt and output; K and V of the first `num_computed` are in its pages."""

    request: EngineRequest
    order: int  # of arrival, from 0
    stop_tokens: frozenset[int]  # tokens that end it: end-of-sequence and stop_token_ids
    tokens: "array[int]"
    prefix: Prefix  # the keys of `tokens`
    num_prompt: int
    max_tokens: int  # of prompt and output
    draft_limit: int = 0  # guesses at the next tokens that a step may try
    num_computed: int = 0
    cached_tokens: int = 0  # of num_computed, found in the prefix cache when it was first admitted
    held: SequencePages = field(init=False)
    tenant: str = field(init=False)  # the same object for all of a tenant's, which makes counting them quick
    prefetch: Prefetch | None = None
    place: tuple[float, int] = (0.0, 0)  # the policy's rank of it, then `order`
    slot: int = -1  # row of the batch columns while it runs
    admitted: bool = False  # at least once: if it waits, it was preempted
    aborted: bool = False

    def __post_init__(self) -> None:
        self.held = SequencePages(self.prefix)
        self.tenant = sys.intern(self.request.tenant)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_draft_tokens(self) -> int:
        """`draft_limit`, but 0 where the next token but one is sampled by rules that depend on the next."""
        params = self.request.params
        return 0 if params.penalized or self.num_outputs < params.min_tokens else self.draft_limit
