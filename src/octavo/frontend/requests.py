"""Convert the arguments of `generate` to requests: prompts with the parameters, terms and KV state of each."""

import asyncio
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, TypeVar, cast

from octavo.engine.messages import EngineInfo, Pooling
from octavo.errors import InvalidRequest, PromptTooLong
from octavo.params import RequestOutputKind, SamplingParams, ServiceTerms, StructuredOutputs, Terms, plain
from octavo.states import KVState
from octavo.text import Tokenizer
from octavo.text.offload import off_loop

MAX_TRUNCATED = 16  # a text that is to be truncated may have this many times the tokens of the context
MAX_ID = 256  # characters in a request id chosen by the user
MAX_PROMPT_LOGPROBS = 2**25  # of a request, in 8 bytes each


class TextPrompt(TypedDict):
    """A prompt of text, in vLLM's form, optionally with its own `cache_salt`."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt of token ids, in vLLM's form, optionally with its text and its own `cache_salt`."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


Prompt = str | list[int] | TextPrompt | TokensPrompt
_PROMPT_KEYS = TextPrompt.__annotations__.keys() | TokensPrompt.__annotations__.keys()
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with its parameters, terms and KV state.

    Attributes:
        prompt: text or token ids; if there is a `state`, only the part after it.
        state: the KV state that the prompt continues.
        pooling: what is wanted of the prompt, if not a continuation.
        reply_id: the id of the reply that a server's client gets, for the trace.
    """

    prompt: str | list[int]
    params: SamplingParams
    terms: ServiceTerms
    state: KVState | None = None
    pooling: Pooling | None = None
    reply_id: str = ""


def make_request(
    prompt: Prompt,
    params: SamplingParams,
    priority: int = 0,
    terms: Terms | None = None,
    state: KVState | None = None,
) -> Request:
    """Make a request of one prompt. Raises InvalidRequest."""
    terms = terms or {}
    content: Any = prompt
    if isinstance(prompt, dict):
        given = {name: value for name, value in prompt.items() if value is not None}  # vLLM's other keys may be None
        if unknown := given.keys() - _PROMPT_KEYS:
            raise InvalidRequest(
                f"a prompt cannot have {min(unknown)}: only text or token ids, and cache_salt", "prompt"
            )
        if "cache_salt" in given:
            terms = cast("Terms", {**terms, "cache_salt": given["cache_salt"]})
        content = given.get("prompt_token_ids", given.get("prompt"))
    content = plain(content)
    if not isinstance(content, (str, list)):
        raise InvalidRequest("a prompt must be a string or a list of token ids", "prompt")
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"sampling_params must be SamplingParams, not {type(params).__name__}", "sampling_params")
    return Request(content, params, ServiceTerms(priority=priority, **terms), state)


def make_requests(
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    default: SamplingParams,
    priority: int | Sequence[int],
    terms: Terms,
    states: KVState | Sequence[KVState] | None = None,
) -> list[Request]:
    """Make a request of each prompt. The other arguments are one for all prompts, or one each. Raises InvalidRequest.

    Args:
        default: the parameters if `params` is None.
    """
    prompts = plain(prompts)
    several = isinstance(prompts, (list, tuple)) and not (prompts and isinstance(plain(prompts[0]), int))
    many = cast("list[Prompt]", list(prompts) if several else [prompts])
    every_params = _one_each(default if params is None else params, len(many), "SamplingParams")
    every_priority = _one_each(priority, len(many), "priority")
    every_state = _one_each(states, len(many), "kv_cache_state")
    every = zip(many, every_params, every_priority, every_state, strict=True)
    return [make_request(prompt, one, priority, terms, state) for prompt, one, priority, state in every]


def _one_each(given: T | Sequence[T], count: int, what: str) -> Sequence[T]:
    if not isinstance(given, (list, tuple)):
        return [cast("T", given)] * count
    if len(given) != count:
        raise InvalidRequest(f"{count} prompts need one {what}, or {count}, not {len(given)}")
    return given


def tokenize(request: Request, tokenizer: Tokenizer, info: EngineInfo) -> list[int]:
    """Return the token ids of a request's prompt, without those of its KV state. May be called by any thread.

    Raises InvalidRequest if the prompt or the parameters have token ids beyond the vocabulary; PromptTooLong.
    """
    _check_params(request.params, info.vocab_size)
    prompt, kept = request.prompt, kept_tokens(request.params, info)
    if kept is not None and request.state is not None:
        raise InvalidRequest("truncate_prompt_tokens does not go with kv_cache_state", "truncate_prompt_tokens")
    if isinstance(prompt, str):
        tokens = encode(prompt, tokenizer, info, kept, add_special_tokens=request.state is None)
    else:
        prompt = prompt if kept is None else prompt[-kept:]
        check_length(len(prompt), info, has_state=request.state is not None)
        tokens = list(prompt)
        if not set(map(type, tokens)) <= {int}:  # numpy's integers, or no integers: -1 is refused below
            tokens = [token if type(token) is int else -1 for token in map(plain, tokens)]
        if tokens and not 0 <= min(tokens) <= max(tokens) < info.vocab_size:
            raise InvalidRequest(f"prompt token ids must be integers from 0 to {info.vocab_size - 1}", "prompt")
    check_length(len(tokens), info, has_state=request.state is not None)
    if (wanted := request.params.prompt_logprobs) is not None:
        count = num_logprobs(len(tokens), wanted, info)
        check_prompt_logprobs(count, MAX_PROMPT_LOGPROBS)
    return tokens


def num_logprobs(tokens: int, wanted: int, info: EngineInfo) -> int:
    """Return the number of logprobs of so many tokens: each has its own, and those of the `wanted` likeliest."""
    return tokens * (1 + (info.vocab_size if wanted == -1 else wanted))


def check_prompt_logprobs(count: int, limit: int) -> None:
    """Raise InvalidRequest if so many logprobs of prompts are more than the limit."""
    if count > limit:
        raise InvalidRequest(
            f"{count:,} logprobs of prompts are wanted: tokens times (1 + prompt_logprobs); the limit is {limit:,}",
            "prompt_logprobs",
        )


def check_logprobs(params: SamplingParams, max_logprobs: int, info: EngineInfo, name: str = "logprobs") -> None:
    """Raise InvalidRequest for more logprobs per token than the setting max_logprobs allows; -1 allows all.

    Args:
        name: the name that `logprobs` has in the request.
    """
    for field, wanted in ((name, params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if wanted is None or max_logprobs == -1:
            continue
        if num_logprobs(1, wanted, info) - 1 > max_logprobs:
            raise InvalidRequest(f"{field} must be at most {max_logprobs} (max_logprobs), not {wanted}", field)


def check_streamable(requests: Iterable[Request]) -> None:
    """Raise InvalidRequest if the completions to return are only known at the end, but a stream begins before it."""
    for request in requests:
        params = request.params
        if params.num_completions > params.n and params.output_kind is not RequestOutputKind.FINAL_ONLY:
            raise InvalidRequest("best_of cannot be streamed: completions are compared when all have ended", "best_of")


def max_output(params: SamplingParams, prompt_tokens: int, info: EngineInfo, max_new_tokens: int | None) -> int:
    """Return the maximum number of output tokens of a completion.

    Args:
        max_new_tokens: the setting of this name.
    """
    capacity = info.max_model_len - prompt_tokens
    if max_new_tokens is not None:
        capacity = min(capacity, max_new_tokens)
    # For no token, one is computed and left out, so that the prompt is computed.
    return capacity if params.max_tokens is None else min(max(params.max_tokens, 1), capacity)


def kept_tokens(params: SamplingParams, info: EngineInfo) -> int | None:
    """Return how many last tokens of the prompt `truncate_prompt_tokens` keeps; None for all.

    At -1, the context has space left for max_tokens, if they are set and fit.
    """
    if params.truncate_prompt_tokens != -1:
        return params.truncate_prompt_tokens
    return max(1, info.max_model_len - max(1, params.max_tokens or 1))


def encode(
    text: str,
    tokenizer: Tokenizer,
    info: EngineInfo,
    kept: int | None,
    add_special_tokens: bool,
    owner: Hashable = None,
) -> list[int]:
    """Return the token ids of a text, or only the last `kept` ones. For `owner`, see Tokenizer.encode.

    Raises InvalidRequest, PromptTooLong.
    """
    if kept is None:
        return tokenizer.encode(text, add_special_tokens, info.max_model_len - 1, owner)
    return tokenizer.encode(text, add_special_tokens, MAX_TRUNCATED * info.max_model_len, owner)[-kept:]


def banned_tokens(words: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token sequences that spell `words`, at the beginning of a text and after a space."""
    spelled: list[list[int]] = []
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            tokens = tokenizer.encode(text, add_special_tokens=False)
            if tokens and tokens not in spelled:
                spelled.append(tokens)
    return spelled


async def tokenize_all(requests: list[Request], tokenizer: Tokenizer, info: EngineInfo) -> list[list[int]]:
    """Return the token ids of each request's prompt. Tokenize long prompts in another thread. Raises as `tokenize`."""

    def work() -> list[list[int]]:
        return [tokenize(request, tokenizer, info) for request in requests]

    tokens = await off_loop(tokenizer, sum(len(request.prompt) for request in requests), work)
    if new_grammars(requests, tokenizer):
        threads = tokenizer.grammars.threads
        await asyncio.get_running_loop().run_in_executor(threads, check_grammars, requests, tokenizer)
    return tokens


def check_grammars(requests: list[Request], tokenizer: Tokenizer) -> None:
    """Compile the grammars of requests, which may take a second. Raises InvalidRequest if one cannot be used."""
    for outputs in new_grammars(requests, tokenizer):
        tokenizer.grammars.matcher(outputs)


def new_grammars(requests: list[Request], tokenizer: Tokenizer) -> list[StructuredOutputs]:
    """Return the grammars of requests that are not known to be usable."""
    grammars = [request.params.structured_outputs for request in requests]
    return [outputs for outputs in grammars if outputs is not None and outputs not in tokenizer.grammars]


def check_sleep(level: int = 1, tags: list[str] | None = None) -> None:
    """Raise InvalidRequest for arguments of `sleep` and `wake_up` that would free or load only a part."""
    if level not in (1, 2):
        raise InvalidRequest(f"level must be 1 or 2, which both free weights and KV cache, not {level!r}", "level")
    if tags is not None and set(tags) != {"weights", "kv_cache"}:
        raise InvalidRequest("tags must be None: weights and KV cache wake up together", "tags")


def check_length(num_tokens: int, info: EngineInfo, has_state: bool = False) -> None:
    """Raise InvalidRequest for an empty prompt, PromptTooLong for one that leaves no space for an output token."""
    if not num_tokens and not has_state:
        raise InvalidRequest("the prompt is empty", "prompt")
    limit = info.max_model_len
    if num_tokens >= limit:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens; the model's context of {limit} has room for at most {limit - 1}",
            "prompt",
        )


def check_id(id: str) -> None:
    """Raise InvalidRequest unless `id` can name a request."""
    if not (isinstance(id, str) and 0 < len(id) <= MAX_ID and id.isprintable()):
        raise InvalidRequest(f"request_id must be 1 to {MAX_ID} printable characters", "request_id")


def _check_params(params: SamplingParams, vocab_size: int) -> None:
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        if any(token >= vocab_size for token in getattr(params, name) or ()):
            raise InvalidRequest(f"{name} has token ids beyond the vocabulary of {vocab_size}", name)
