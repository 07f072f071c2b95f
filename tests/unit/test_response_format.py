"""Structured output in request bodies: which fields set which constraint, and which are refused."""

from typing import Any

import pytest

from octavo.errors import InvalidRequest
from octavo.params import StructuredOutputs
from octavo.server.openai.response_format import structured_outputs_of

SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("structured", "format", "guided", "expected"),
    [
        (None, {"type": "text"}, {}, None),
        (None, {"type": "json_object"}, {}, StructuredOutputs(json_object=True)),
        (
            None,
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
            {},
            StructuredOutputs(json=SCHEMA),
        ),
        ({"regex": "a+"}, {"type": "text"}, {}, StructuredOutputs(regex="a+")),
        (None, None, {"guided_choice": ["a", "b"]}, StructuredOutputs(choice=["a", "b"])),
    ],
)
def test_constraints(structured: Any, format: Any, guided: dict[str, Any], expected: StructuredOutputs | None) -> None:
    assert structured_outputs_of(structured, format, guided) == expected


@pytest.mark.parametrize(
    ("structured", "format", "guided"),
    [
        (None, {"type": "xml"}, {}),
        (None, "json", {}),
        (None, {"type": "json_schema"}, {}),
        (None, {"type": "json_schema", "json_schema": {"name": "a", "schema": 3}}, {}),
        ({"regex": "a", "what": 1}, None, {}),
        ({"regex": "a"}, {"type": "json_object"}, {}),
        (None, None, {"guided_regex": "a", "guided_json": {}}),
    ],
)
def test_refused(structured: Any, format: Any, guided: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        structured_outputs_of(structured, format, guided)
