"""Sequence: one request that the engine is working on."""

import sys
from array import array
from dataclasses import dataclass, field

from octavo.kv import PageTable, Prefetch, Prefix
from octavo.params import SamplingParams

from .messages import EngineRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and its progress.

    Attributes:
        order: number of the request in order of arrival at this engine, from 0.
        stop_tokens: tokens that end it: end-of-sequence tokens and stop_token_ids.
        tokens: prompt and output.
        prefix: the page keys of `tokens`.
        max_tokens: of prompt and output together.
        draft_limit: draft tokens that a step may try.
        arrival: on the engine's clock, in seconds.
        num_computed: K and V of so many of `tokens` are in the pages of `page_table`.
        cached_tokens: tokens found in the prefix cache when it was first admitted.
        prefetch: pages that are fetched for it while it waits.
        place: (rank, order), the rank being the policy's; sorts sequences.
        slot: row of the batch columns while it runs; -1 while it waits.
        admitted: it has run before; if it waits, it was preempted.
        aborted: it has been taken out, or has failed.
        tenant: the same object for all sequences of a tenant, which makes counting them fast.
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
    cached_tokens: int = 0
    page_table: PageTable = field(init=False)
    tenant: str = field(init=False)
    prefetch: Prefetch | None = None
    place: tuple[float, int] = (0.0, 0)
    slot: int = -1
    admitted: bool = False
    aborted: bool = False

    def __post_init__(self) -> None:
        self.page_table = PageTable(self.prefix)
        self.tenant = sys.intern(self.request.tenant)

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
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_draft_tokens(self) -> int:
        """The number of draft tokens to try now; 0 where the way a token is sampled depends on the one before it."""
        params = self.request.params
        return 0 if params.penalized or self.num_outputs < params.min_tokens else self.draft_limit
