"""What `generate` accepts: one prompt or several; parameters, priority and KV state for all of them, or one each."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, TypeVar, cast

from octavo.errors import InvalidRequest
from octavo.params import SamplingParams, ServiceTerms, Terms
from octavo.states import KVState


class PromptDict(TypedDict, total=False):
    """A prompt as vLLM's users write it: `prompt` or `prompt_token_ids`, and perhaps a `cache_salt` of its own."""

    prompt: str
    prompt_token_ids: list[int]
    cache_salt: str


Prompt = str | list[int] | PromptDict
T = TypeVar("T")


class Ask(NamedTuple):
    """One prompt, and all that its user has to say about it."""

    prompt: str | list[int]
    params: SamplingParams
    terms: ServiceTerms
    state: KVState | None = None  # what the prompt goes on from


def ask(
    prompt: Prompt, params: SamplingParams | None, priority: int, terms: Terms, state: KVState | None = None
) -> Ask:
    """Raises InvalidRequest."""
    if isinstance(prompt, dict):
        if unknown := prompt.keys() - PromptDict.__annotations__.keys():
            raise InvalidRequest(f"a prompt has no {min(unknown)}: text and token ids only", "prompt")
        if "cache_salt" in prompt:
            terms = {**terms, "cache_salt": prompt["cache_salt"]}
        content = prompt.get("prompt_token_ids", prompt.get("prompt"))
    else:
        content = prompt
    if not isinstance(content, (str, list)):
        raise InvalidRequest("a prompt must be a string or a list of token ids", "prompt")
    return Ask(content, params or SamplingParams(), ServiceTerms(priority=priority, **terms), state)


def asks(
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    priority: int | Sequence[int],
    terms: Terms,
    states: KVState | Sequence[KVState] | None = None,
) -> list[Ask]:
    """An Ask for each prompt. Raises InvalidRequest."""
    several = isinstance(prompts, (list, tuple)) and not (prompts and isinstance(prompts[0], int))
    many = cast("list[Prompt]", list(prompts) if several else [prompts])
    every_params = _one_each(params, len(many), "SamplingParams")
    every_priority = _one_each(priority, len(many), "priority")
    every_state = _one_each(states, len(many), "kv_cache_state")
    every = zip(many, every_params, every_priority, every_state, strict=True)
    return [ask(prompt, params, priority, terms, state) for prompt, params, priority, state in every]


def _one_each(given: T | Sequence[T], count: int, what: str) -> Sequence[T]:
    if not isinstance(given, (list, tuple)):
        return [cast("T", given)] * count
    if len(given) != count:
        raise InvalidRequest(f"{count} prompts need one {what}, or {count}, not {len(given)}")
    return given
