"""What the routes of Anthropic's and Ollama's APIs share: bodies are translated to those of OpenAI's routes."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .errors import ApiError, invalid_body, unknown_field
from .openai.protocol import Parameters

Body = TypeVar("Body", bound=BaseModel)

# Parameters that would change the form of an answer, for which the other APIs have no place.
_NOT_PASSED = {"n", "logprobs", "top_logprobs", "prompt_logprobs", "stop", "structured_outputs"}
PASSED = frozenset(Parameters.model_fields) - _NOT_PASSED
"""Sampling parameters and terms of service that keep their names in the body for OpenAI's routes."""


def parse(kind: type[Body], content: Any) -> Body:
    """Return a parsed JSON body as a model. Raises ApiError 400."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise invalid_body(error) from None


def passed_fields(extra: Mapping[str, Any] | None, known: Collection[str], ignored: Collection[str]) -> dict[str, Any]:
    """Return the fields of a body that its API does not have but Octavo does.

    Args:
        extra: the fields that are not declared for the body.
        known: names of those that are, for hints.
        ignored: names of fields that have no effect.

    Raises ApiError 400 for any other field that is not null or empty.
    """
    passed = {}
    for name, value in (extra or {}).items():
        if name in PASSED:
            passed[name] = value
        elif value and name not in ignored:
            raise unknown_field(name, name, [*known, *PASSED])
    return passed


def text_of(content: Any, path: str) -> str | list[dict[str, str]]:
    """Return text, or a list of text blocks without their other fields. Raises ApiError 400 for other blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{path} should be a string or an array of content blocks", path)
    parts = [text_block(block, f"{path}[{i}]") for i, block in enumerate(content)]
    return parts[0]["text"] if len(parts) == 1 else parts if parts else ""


def text_block(block: Any, path: str) -> dict[str, str]:
    """Return a text block as a content part. Raises ApiError 400 for any other block."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text" and isinstance(block.get("text"), str):
        return {"type": "text", "text": block["text"]}
    if kind in ("image", "document"):
        raise ApiError(400, f"{path} is of type {kind}: this server's models read only text", path)
    raise ApiError(400, f"{path} should be a content block of a supported type", path)


def json_schema(schema: Any) -> dict[str, Any]:
    """Return the response_format of OpenAI's API for answers that match a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
