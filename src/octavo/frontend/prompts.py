"""What `generate` accepts: one prompt or several, one SamplingParams or one each."""

from collections.abc import Sequence
from typing import cast

from octavo.errors import InvalidRequest
from octavo.params import SamplingParams

Prompt = str | list[int]


def pair(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Prompt, SamplingParams]]:
    """Each prompt with its parameters. Raises InvalidRequest."""
    one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
    many = cast("list[Prompt]", [prompts] if one else list(prompts))
    if not all(isinstance(prompt, (str, list)) for prompt in many):
        raise InvalidRequest("a prompt must be a string or a list of token ids", "prompt")
    if params is None or isinstance(params, SamplingParams):
        return [(prompt, params or SamplingParams()) for prompt in many]
    if len(params) != len(many):
        raise InvalidRequest(f"{len(many)} prompts need one SamplingParams, or {len(many)}, not {len(params)}")
    return list(zip(many, params, strict=True))
