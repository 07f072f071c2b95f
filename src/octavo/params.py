"""How to sample (SamplingParams) and how to be served (ServiceTerms), with vLLM's names and defaults."""

import math
from typing import TypedDict

import msgspec

from .errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_PRIORITY = 1000  # either way: waiting makes up for priority, and is to do so within hours
MAX_SECONDS = 86_400.0  # that a request may ask for
MAX_NAME = 256  # characters of a tenant's name, or of a salt


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Per-request sampling parameters. Requests with different ones share a batch at no cost.

    n: completions per prompt. temperature: 0 is greedy. top_p, top_k (0 or -1: all), min_p: truncations, applied in the
    order top_k, top_p, min_p. max_tokens: new tokens at most; None: up to the model's context. min_tokens: no end
    before so many. stop: strings that end the output, left out of it. stop_token_ids: tokens that end it.
    seed: same seed, same text; None: one is drawn and reported. logprobs: so many of the likeliest tokens with each
    sampled one (at most 20). presence_penalty, frequency_penalty (-2 to 2): over the output; repetition_penalty (> 0):
    over prompt and output. logit_bias: token id to a bias of -100 to 100. ignore_eos: go on after end-of-sequence.
    speculative_tokens: guesses a step may try for this request; None: as the engine is set. The tokens stay the same.

    Raises InvalidRequest (a ValueError) for a value out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool = False
    speculative_tokens: int | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, param: str, what: str) -> None:
            if not ok:
                raise InvalidRequest(f"{param} must be {what}, not {getattr(self, param)!r}", param)

        def number(param: str, low: float, high: float, what: str) -> None:
            value = getattr(self, param)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            need(is_number and math.isfinite(value) and low <= value <= high, param, what)

        def integer(param: str, low: int, high: int, what: str) -> None:
            value = getattr(self, param)
            need(isinstance(value, int) and not isinstance(value, bool) and low <= value <= high, param, what)

        integer("n", 1, 128, "an integer from 1 to 128")
        number("temperature", 0.0, 100.0, "a number from 0 (greedy) to 100")
        number("top_p", 0.0, 1.0, "a number above 0 and at most 1")
        need(self.top_p > 0, "top_p", "a number above 0 and at most 1")
        integer("top_k", -1, 2**31 - 1, "an integer: how many tokens to keep, or 0 for all")
        number("min_p", 0.0, 1.0, "a number from 0 to 1")
        if self.max_tokens is not None:
            integer("max_tokens", 1, 2**31 - 1, "an integer of at least 1")
        integer("min_tokens", 0, 2**31 - 1, "an integer of at least 0")
        limit = self.max_tokens
        need(limit is None or self.min_tokens <= limit, "min_tokens", f"at most max_tokens ({limit})")
        stops = self.stop_strings
        need(
            isinstance(stops, list) and all(isinstance(s, str) and s for s in stops) and len(stops) <= 16,
            "stop",
            "a non-empty string or a list of at most 16 of them",
        )
        ids = self.stop_token_ids or []
        need(
            isinstance(ids, list) and len(ids) <= 1024 and all(isinstance(t, int) and t >= 0 for t in ids),
            "stop_token_ids",
            "a list of at most 1,024 token ids",
        )
        if self.seed is not None:
            integer("seed", -(2**63), 2**64 - 1, "a 64-bit integer")
        if self.logprobs is not None:
            integer("logprobs", 0, MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}")
        number("presence_penalty", -2.0, 2.0, "a number from -2 to 2")
        number("frequency_penalty", -2.0, 2.0, "a number from -2 to 2")
        # At least 1e-30: logits are divided by it in float32.
        number("repetition_penalty", 1e-30, 100.0, "a number above 0 (at least 1e-30) and at most 100")
        bias = self.logit_bias or {}
        need(
            isinstance(bias, dict)
            and len(bias) <= 1024
            and all(isinstance(t, int) and t >= 0 for t in bias)
            and all(isinstance(v, (int, float)) and -100 <= v <= 100 for v in bias.values()),
            "logit_bias",
            "a map of at most 1,024 token ids to numbers from -100 to 100",
        )
        need(isinstance(self.ignore_eos, bool), "ignore_eos", "true or false")
        if self.speculative_tokens is not None:
            integer("speculative_tokens", 0, 1024, "an integer from 0 to 1,024")

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else (self.stop or [])

    @property
    def penalized(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


class Terms(TypedDict, total=False):
    """Keywords of every method that generates, beside `priority`: see ServiceTerms."""

    tenant: str
    ttft_target: float | None
    timeout: float | None
    cache_salt: str | None


class ServiceTerms(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request is to be served. None of it changes a token.

    priority: -1000 to 1000, lower is sooner, under the policy "priority". tenant: whose request it is, at most 256
    printable characters; the policy "fair" shares between tenants. ttft_target: seconds from arrival in which the first
    token is wanted; the policy "deadline" goes by it. timeout: seconds from arrival after which the request ends with
    RequestTimeout; None: as the engine is set (`request_timeout`). Both are up to a day.
    cache_salt: 1 to 256 printable characters. Cached prefixes are shared only between requests with the same salt and
    the same tenant, so that nobody else can tell from the time an answer takes whether a prompt was seen before.

    Raises InvalidRequest (a ValueError) for a value out of range.
    """

    priority: int = 0
    tenant: str = ""
    ttft_target: float | None = None
    timeout: float | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, param: str, what: str) -> None:
            if not ok:
                value = getattr(self, param)
                raise InvalidRequest(f"{param} must be {what}, not {value!r}", param)

        def text(value: object, shortest: int) -> bool:
            # Printable: names are shown on terminals, and what is printable can be encoded.
            return isinstance(value, str) and shortest <= len(value) <= MAX_NAME and value.isprintable()

        priority = self.priority
        whole = isinstance(priority, int) and not isinstance(priority, bool)
        need(whole and abs(priority) <= MAX_PRIORITY, "priority", f"an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}")
        need(text(self.tenant, 0), "tenant", f"at most {MAX_NAME} printable characters")
        for param in ("ttft_target", "timeout"):
            value = getattr(self, param)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            need(value is None or (is_number and 0 < value <= MAX_SECONDS), param, "a number of seconds, at most a day")
        salt = self.cache_salt
        need(salt is None or text(salt, 1), "cache_salt", f"1 to {MAX_NAME} printable characters")
