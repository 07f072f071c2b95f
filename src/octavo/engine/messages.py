"""What goes into an engine and what comes out of it. Plain data that crosses a process."""

import msgspec

from octavo.params import SamplingParams


class EngineRequest(msgspec.Struct, frozen=True, array_like=True):
    """One sequence to generate.

    Attributes:
        id: unique among live requests.
        prompt: token ids.
        params: resolved: n = 1, seed and max_tokens set, no stop strings (the frontend looks for those).
        age: seconds since the request arrived, at the time this message is sent.
        eos: the tokenizer's end-of-sequence tokens; empty if the request ignores them.
        output: tokens that an earlier engine already generated for it; they are recomputed, not sent again.
        after: the id of a live request with the same prompt; this one waits until that prompt is in the cache.
        tenant, salt: pages are shared only between requests with the same two, and the same origin.
        origin: the origin of the KV state that it continues (KVState.origin); "" if it continues none.
        priority: lower goes first.
        ttft_target, timeout: seconds from arrival to the first and to the last token.
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


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The logprob and rank of one sampled token, and the likeliest tokens with their logprobs."""

    logprob: float
    rank: int
    top_tokens: list[int]
    top_logprobs: list[float]


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """One new token of one request.

    Attributes:
        token: -1 if the request ended without one.
        finish_reason: set on the last output: "stop", "length", "error" (the request could not be continued) or
            "timeout".
        stop_token: the entry of stop_token_ids that ended it.
        cached_tokens: tokens of the prompt that were found in the prefix cache.
        message: why it ended in an error or a timeout.
    """

    id: str
    token: int
    finish_reason: str | None = None
    stop_token: int | None = None
    logprobs: TokenLogprobs | None = None
    cached_tokens: int = 0
    message: str | None = None


class EngineInfo(msgspec.Struct, frozen=True):
    """What a frontend must know of its engine. `fingerprint` names all that decides the bits of a page's K and V."""

    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    fingerprint: str = ""


class EngineStats(msgspec.Struct, frozen=True):
    """The engine's state between two steps; counters count from its start.

    Attributes:
        running, waiting: sequences.
        waiting_for_pages: of those that wait, the ones whose pages are being fetched from a lower tier, or have been.
        waiting_for_prompt: of those that wait, the ones that start when another completion's prompt is computed.
        free_pages, cached_pages, num_pages: pages of the pool; the others are in use.
        preemptions: sequences that lost their pages and waited again.
        tokens_computed: rows of all steps, without those of draft tokens.
        prompt_tokens, cached_tokens: tokens of all prompts that were computed, and how many of them were found in the
            prefix cache.
        draft_tokens, accepted_tokens: draft tokens computed, and accepted.
        step_seconds, backend_seconds: time in Engine.step, and the part of it in the backend.
        decode_rows, prefill_rows, draft_rows: rows of the last step, of sequences with one token to compute, of those
            with more, and of draft tokens; 0 when there is nothing to do.
        page_map: see octavo.kv.page_map.
        num_pinned: pages referenced by KV states.
        num_fetching, pages_fetched: pages being fetched from a lower tier, and fetched so far.
        pending_saves, pages_saved: pages being saved to the lower tiers, and saved so far.
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
