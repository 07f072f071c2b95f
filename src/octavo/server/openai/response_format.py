"""Structured output in request bodies: OpenAI's response_format, vLLM's structured_outputs and guided_... fields."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from octavo.errors import InvalidRequest
from octavo.params import StructuredOutputs

GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""vLLM's older fields, and the constraints of StructuredOutputs that they set."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Schema(_Part):
    """The schema of an answer. Schemas are always enforced, whether `strict` is true or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = None
    strict: bool | None = None


class _Plain(_Part):
    type: Literal["text", "json_object"]


class _JsonSchema(_Part):
    type: Literal["json_schema"]
    json_schema: _Schema


class _Tags(_Part):
    """vLLM's structural tags: either `format`, or the older fields structures and triggers."""

    type: Literal["structural_tag"]
    format: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


_FORMATS: dict[Any, type[_Part]] = {
    "text": _Plain,
    "json_object": _Plain,
    "json_schema": _JsonSchema,
    "structural_tag": _Tags,
}

FORMAT_SCHEMA = {"type": "object", "properties": {"type": {"enum": list(_FORMATS)}}, "required": ["type"]}
"""The schema of response_format in /openapi.json."""


def structured_outputs_of(
    structured_outputs: Any, response_format: Any, guided: dict[str, Any]
) -> StructuredOutputs | None:
    """Return the constraint that the fields of a body set, None if they set none.

    Args:
        structured_outputs, response_format: the fields of that name.
        guided: the values of vLLM's guided_... fields that are given.

    Raises:
        InvalidRequest: A field is malformed, or several set a constraint.
    """
    constraints: list[tuple[str, dict[str, Any]]] = []
    if structured_outputs:
        if not isinstance(structured_outputs, dict):
            raise InvalidRequest("structured_outputs must be an object with one constraint", "structured_outputs")
        given = {name: value for name, value in structured_outputs.items() if value is not None}
        constraints.append(("structured_outputs", given))
    constraints += [(name, {GUIDED[name]: value}) for name, value in guided.items()]
    if response_format is not None and (wanted := _of_format(response_format)):
        constraints.append(("response_format", wanted))
    if not constraints:
        return None
    name, constraint = constraints[0]
    if len(constraints) > 1:
        raise InvalidRequest(f"{name} and {constraints[1][0]} cannot be used together", name)
    if unknown := constraint.keys() - set(StructuredOutputs.__struct_fields__):
        raise InvalidRequest(f"{name} has no {min(map(str, unknown))}", name)
    try:
        return StructuredOutputs(**constraint)
    except InvalidRequest as error:
        raise InvalidRequest(str(error), name) from None


def _of_format(response_format: Any) -> dict[str, Any]:
    """Return the constraint of OpenAI's response_format, empty for plain text."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    model = _FORMATS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise InvalidRequest(f"response_format must have a type, one of {', '.join(_FORMATS)}", "response_format")
    body = dict(response_format)
    if isinstance(schema := body.get("json_schema"), dict) and "schema" in schema:
        body["json_schema"] = {("schema_" if name == "schema" else name): value for name, value in schema.items()}
    try:
        format = model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join("schema" if part == "schema_" else str(part) for part in first["loc"])
        raise InvalidRequest(f"response_format.{at}: {first['msg']}", "response_format") from None
    if isinstance(format, _JsonSchema):
        # Without a schema, any JSON object is allowed.
        return {"json_object": True} if format.json_schema.schema_ is None else {"json": format.json_schema.schema_}
    if isinstance(format, _Tags):
        return {"structural_tag": format.model_dump(exclude_none=True)}
    return {"json_object": True} if kind == "json_object" else {}
