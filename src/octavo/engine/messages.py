"""Inputs and outputs of an engine: plain data that can be sent between processes."""

from typing import Literal

import msgspec

from octavo.kv.tiers.counts import TierCounts
from octavo.params import SamplingParams

from .engine_plan import EnginePlan


class Pooling(msgspec.Struct, frozen=True, array_like=True):
    """What a pooled request wants of its prompt, instead of a continuation: a hidden state, or logits.

    Attributes:
        hidden: "mean": the mean of the hidden states of all tokens; "last": that of the last token; both after the
            final norm.
        labels: token ids whose logits after the prompt are wanted, if `hidden` is None.
    """

    hidden: Literal["mean", "last"] | None = None
    labels: list[int] = []


class Thinking(msgspec.Struct, frozen=True, array_like=True):
    """A limit of the tokens that a model may spend on reasoning.

    Attributes:
        budget: tokens of reasoning after which its end is forced.
        start, end: the tokens that begin and end the reasoning.
    """

    budget: int
    start: list[int]
    end: list[int]


class PageSource(msgspec.Struct, frozen=True, array_like=True):
    """Another engine that has the first pages of a sequence.

    Attributes:
        address: where it serves them, such as tcp://10.0.0.5:40123.
        pages: how many full pages, from the first one on.
    """

    address: str
    pages: int


class EngineRequest(msgspec.Struct, frozen=True, array_like=True):
    """One sequence to generate, or to pool.

    Attributes:
        id: unique among live requests.
        prompt: token ids.
        params: resolved parameters: n = 1, seed and max_tokens set, no stop strings (the frontend searches for them).
        age: seconds from the request's arrival until this message was sent.
        eos: the tokenizer's end-of-sequence tokens; empty if the request ignores them.
        output: tokens that an earlier engine already generated. Their K and V are recomputed; they are not sent again.
        after: the id of a live request with the same prompt; this request waits until that prompt is in the cache.
        tenant, salt: only requests with the same tenant, salt and origin share pages.
        banned: token sequences whose last token is never sampled after the others.
        pooling: what is wanted of the prompt, if not a continuation.
        thinking: the limit of the model's reasoning, if there is one.
        origin: the origin of the KV state that the request continues (KVState.origin); "" if it continues none.
        priority: lower goes first.
        ttft_target: target for the seconds from arrival to the first token.
        timeout: limit on the seconds from arrival to the last token.
        is_traced: whether the frontend wants to know what happens to the request; see RequestEvents.
        weight: the tenant's share under the policy `fair`; None for that of the settings.
        source: the engine that has most pages of prompt and output, if it is not the one that gets this message.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    age: float = 0.0
    eos: list[int] = []
    output: list[int] = []
    after: str | None = None
    tenant: str = ""
    salt: str = ""
    priority: int = 0
    ttft_target: float | None = None
    timeout: float | None = None
    origin: str = ""
    banned: list[list[int]] = []
    pooling: Pooling | None = None
    thinking: Thinking | None = None
    is_traced: bool = False
    weight: float | None = None
    source: PageSource | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs and ranks of T tokens in a row, and the K likeliest tokens at each position, as arrays in bytes.

    Shapes:
        logprobs: float32 [T]
        ranks: int32 [T]
        top_tokens: int32 [T, K]
        top_logprobs: float32 [T, K]
    """

    logprobs: bytes
    ranks: bytes
    top_tokens: bytes = b""
    top_logprobs: bytes = b""

    @classmethod
    def joined(cls, parts: "list[TokenLogprobs]") -> "TokenLogprobs":
        """Return the logprobs of consecutive parts as one."""
        return cls(*(b"".join(getattr(part, name) for part in parts) for name in cls.__struct_fields__))


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """One new token of one request.

    Attributes:
        token: -1 if the request ended without one.
        finish_reason: set on the last output: "stop", "length", "error" (the request could not be continued), "invalid"
            (its own constraints leave no token, or cannot be followed within the limits) or "timeout".
        stop_token: the entry of stop_token_ids that ended the request.
        cached_tokens: tokens of the prompt that were found in the prefix cache.
        message: the reason for an error or a timeout.
        in_text: whether a token that ends the output with "stop" belongs to its text: the last token of a grammar.
        prompt_logprobs: those of the prompt's tokens from the second one on, with the request's first token, if it
            wants them.
        pooled: the vector of a pooled request, float32, with its only output, which has no token.
        time_in_queue: seconds from the request's arrival to its admission, with its first output; otherwise None.
    """

    id: str
    token: int
    finish_reason: str | None = None
    stop_token: int | None = None
    logprobs: TokenLogprobs | None = None
    cached_tokens: int = 0
    message: str | None = None
    in_text: bool = False
    prompt_logprobs: TokenLogprobs | None = None
    pooled: bytes | None = None
    time_in_queue: float | None = None


STEP_TOKENS = (1, *(2**power for power in range(3, 15)))
"""Upper bounds of the buckets of `EngineStats.step_tokens`."""
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
"""Upper bounds of the buckets of `EngineStats.preempted`."""


class EngineInfo(msgspec.Struct, frozen=True):
    """Properties of an engine that its frontend needs.

    Attributes:
        fingerprint: identifies everything that determines the bits of a page's K and V.
        hidden_size: elements of a hidden state.
        plan: what was decided when the engine was loaded.
        role: one of config.ROLES.
    """

    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    fingerprint: str = ""
    hidden_size: int = 0
    plan: EnginePlan | None = None
    role: str = "both"


class EngineStats(msgspec.Struct, frozen=True):
    """The engine's state between two steps. Counters count from its start.

    Attributes:
        running, waiting: number of sequences.
        waiting_for_pages: waiting sequences whose pages are being fetched from a lower tier, or have been.
        waiting_for_prompt: waiting sequences that start when another completion's prompt is computed.
        free_pages, cached_pages, num_pages: free, cached and all pages of the pool; the others are in use.
        preemptions: number of preemptions.
        tokens_computed: rows of all steps, without those of draft tokens.
        prompt_tokens, cached_tokens: tokens of all computed prompts, and those of them found in the prefix cache.
        draft_tokens, accepted_tokens: computed and accepted draft tokens.
        step_seconds, backend_seconds: time in Engine.step, and the part of it in the backend.
        decode_rows, prefill_rows, draft_rows: rows of the last step: of sequences with one token to compute, of
            sequences with more, and of draft tokens; 0 while the engine is idle.
        page_map: see octavo.kv.page_map.
        num_pinned: pages referenced by KV states.
        num_fetching, pages_fetched: pages being fetched from a lower tier, and fetched so far.
        pending_saves, pages_saved: pages being saved to the lower tiers, and saved so far.
        refused_pages: pages that were changed on disk since they were saved and encrypted (kv_key).
        damaged: sequences that ended because the model computed logits that are NaN or infinite.
        step_tokens: number of steps by their rows, in buckets of at most STEP_TOKENS rows, then of more.
        preempted: number of ended sequences by their preemptions, in buckets of at most PREEMPTIONS, then of more.
        preemptions_of_ended: preemptions of these sequences.
        accepted: number of drafts by how many of their first tokens were accepted, from 0 on.
        tiers: what was moved to and from the tiers, by name: host, disk, store, peers (other
            engines), and state for loaded KV states.
    """

    running: int
    waiting: int
    waiting_for_pages: int
    waiting_for_prompt: int
    free_pages: int
    cached_pages: int
    num_pages: int
    steps: int
    preemptions: int
    tokens_computed: int
    tokens_generated: int
    prompt_tokens: int
    cached_tokens: int
    draft_tokens: int
    accepted_tokens: int
    step_seconds: float
    backend_seconds: float
    decode_rows: int
    prefill_rows: int
    draft_rows: int
    page_map: str
    num_pinned: int
    num_fetching: int
    pending_saves: int
    pages_saved: int
    pages_fetched: int
    refused_pages: int
    damaged: int
    step_tokens: list[int]
    preempted: list[int]
    preemptions_of_ended: int
    accepted: list[int]
    tiers: dict[str, TierCounts] = {}
