"""What `generate` accepts: one prompt or several; parameters, priority and KV state for all of them, or one each."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar, cast

from octavo.errors import InvalidRequest
from octavo.params import SamplingParams, ServiceTerms, Terms

from .kv_states import KVState

Prompt = str | list[int]
T = TypeVar("T")


class Ask(NamedTuple):
    """One prompt, and all that its user has to say about it."""

    prompt: Prompt
    params: SamplingParams
    terms: ServiceTerms
    state: KVState | None = None  # what the prompt goes on from


def asks(
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    priority: int | Sequence[int],
    terms: Terms,
    states: KVState | Sequence[KVState] | None = None,
) -> list[Ask]:
    """An Ask for each prompt. Raises InvalidRequest."""
    one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
    many = cast("list[Prompt]", [prompts] if one else list(prompts))
    if not all(isinstance(prompt, (str, list)) for prompt in many):
        raise InvalidRequest("a prompt must be a string or a list of token ids", "prompt")
    every_params = _one_each(SamplingParams() if params is None else params, len(many), "SamplingParams")
    every_terms = [ServiceTerms(priority=each, **terms) for each in _one_each(priority, len(many), "priority")]
    every_state = _one_each(states, len(many), "kv_cache_state")
    return [Ask(*each) for each in zip(many, every_params, every_terms, every_state, strict=True)]


def _one_each(given: T | Sequence[T], count: int, what: str) -> Sequence[T]:
    if not isinstance(given, (list, tuple)):
        return [cast("T", given)] * count
    if len(given) != count:
        raise InvalidRequest(f"{count} prompts need one {what}, or {count}, not {len(given)}")
    return given
