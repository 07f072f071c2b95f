"""What goes into an engine and what comes out of it. Plain data that crosses a process."""

import msgspec

from octavo.params import SamplingParams


class EngineRequest(msgspec.Struct, frozen=True, array_like=True):
    """One sequence to generate. `id` is unique among live requests.

    `params` come resolved: n = 1, seed and max_tokens set, no stop strings (the frontend sees to those).
    `eos`: the tokenizer's end-of-sequence tokens; none if the request ignores them.
    `output`: tokens that an earlier engine already gave for it; they are recomputed, not sent again.
    `after`: the id of a live request with the same prompt; this one starts when that one's prompt is in the cache.
    `tenant`, `salt`: pages are found only by requests that have the same two.
    `priority`: lower is sooner. `ttft_target`, `timeout`: seconds from `arrival` to the first, and to the last token.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    arrival: float
    eos: list[int] = []
    output: list[int] = []
    after: str | None = None
    tenant: str = ""
    salt: str = ""
    priority: int = 0
    ttft_target: float | None = None
    timeout: float | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of one sampled token: its logprob and rank, and the likeliest tokens with theirs."""

    logprob: float
    rank: int
    top_tokens: list[int]
    top_logprobs: list[float]


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """One new token of one request; its last one has a finish_reason.

    `finish_reason` "error" means that the request could not go on, "timeout" that its time was up: token is -1 and
    `message` says why.
    """

    id: str
    token: int
    finish_reason: str | None = None
    stop_token: int | None = None  # the stop_token_ids entry that ended it
    logprobs: TokenLogprobs | None = None
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    message: str | None = None


class EngineInfo(msgspec.Struct, frozen=True):
    """What a frontend must know of the engine it talks to."""

    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    fingerprint: str = ""  # names all that decides the bits of a page of the KV cache


class EngineStats(msgspec.Struct, frozen=True):
    """A look at the engine between two steps. Counters are since the start.

    `decode_rows`, `prefill_rows`, `draft_rows`: what the last step computed, for sequences with one token to compute,
    for those with more, and as guesses; 0 when there is nothing to do. `prompt_tokens`, `cached_tokens`: of the prompts
    that have begun to be answered, and of those, found in the cache. `page_map`: see octavo.kv.page_map.
    """

    running: int
    waiting: int
    arriving: int  # of those, whose pages are on the way from a lower tier, or there
    held_back: int  # of those, who wait for the prompt of another completion
    free_pages: int
    cached_pages: int
    num_pages: int
    steps: int
    preemptions: int
    tokens_computed: int
    tokens_generated: int
    prompt_tokens: int
    cached_tokens: int
    draft_tokens: int  # computed as guesses; tokens_computed does not count them
    accepted_tokens: int  # of those, kept
    step_seconds: float  # in Engine.step
    backend_seconds: float  # of those, in the backend
    decode_rows: int
    prefill_rows: int
    draft_rows: int
    page_map: str
    num_pinned: int  # pages held by KV states
    num_fetching: int  # pages on the way from a lower tier
    pending_saves: int  # pages on the way to one
    pages_saved: int
    pages_fetched: int
