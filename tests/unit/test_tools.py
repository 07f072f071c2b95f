"""The tools of a request, and the constraint that follows from them."""

import json
from typing import Any

import jsonschema
import pytest

from octavo.config import REASONING_PARSERS as REASONING_NAMES
from octavo.config import TOOL_PARSERS as TOOL_NAMES
from octavo.errors import InvalidRequest
from octavo.server.openai.tools import tools_of
from octavo.text import Tokenizer
from octavo.text.reasoning import REASONING_PARSERS
from octavo.text.tools import TOOL_PARSERS
from toy_engine import toy_tokenizer

TREE = {"$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}},
        "type": "object", "properties": {"root": {"$ref": "#/$defs/node"}}}  # fmt: skip
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or CITY, **more}}


TOOLS = [tool("weather"), tool("tree", TREE)]
NAMED = {"type": "function", "function": {"name": "weather"}}


def schema_of(choice: Any, parallel: bool | None = None) -> Any:
    tools = tools_of(TOOLS, choice, parallel)
    assert tools is not None
    constraint = tools.constraint("hermes")
    assert constraint is not None
    return json.loads(constraint.json) if isinstance(constraint.json, str) else constraint.json


def allows(schema: Any, value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def test_the_settings_have_all_parsers() -> None:
    assert set(TOOL_NAMES) == set(TOOL_PARSERS)
    assert set(REASONING_NAMES) == set(REASONING_PARSERS)


def test_required_calls() -> None:
    schema = schema_of("required")
    call = {"name": "weather", "parameters": {"city": "Oslo"}}
    assert allows(schema, [call]) and allows(schema, [call, call])
    assert not allows(schema_of("required", parallel=False), [call, call])
    assert not allows(schema, [])
    assert not allows(schema, [{"name": "other", "parameters": {}}])
    assert not allows(schema, [{"name": "weather", "parameters": {"city": 5}}])
    assert not allows(schema, [{"name": "tree", "parameters": {"root": {}}}])
    assert allows(schema, [{"name": "tree", "parameters": {}}])


def test_a_named_call() -> None:
    assert schema_of(NAMED) == CITY


def test_allowed_calls() -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    schema = schema_of(allowed)
    assert allows(schema, [{"name": "weather", "parameters": {"city": "Oslo"}}])
    assert not allows(schema, [{"name": "tree", "parameters": {}}])
    tools = tools_of(
        TOOLS, {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "tree"}]}, None
    )
    assert tools is not None and (tools.mode, list(tools.schemas)) == ("auto", ["tree"])


def test_strict_functions_constrain_calls_in_free_text() -> None:
    tools = tools_of([tool("weather", strict=True), tool("loose")], "auto", None)
    assert tools is not None
    constraint = tools.constraint("hermes")
    assert constraint is not None
    tag = constraint.structural_tag
    tag = json.loads(tag) if isinstance(tag, str) else tag
    assert tag["triggers"] == ["<tool_call>"]
    first, second = tag["structures"]
    assert first == {
        "begin": '<tool_call>\n{"name": "weather", "arguments": ',
        "schema": CITY,
        "end": "}\n</tool_call>",
    }
    assert second["schema"] == {"type": "object"}
    assert tools.constraint("llama3_json") is None
    plain = tools_of(TOOLS, None, None)
    assert plain is not None and plain.constraint("hermes") is None


@pytest.mark.parametrize(
    "tools, choice, said",
    [
        ([], "required", "needs tools"),
        ("text", None, "must be a list"),
        ([5], None, "tools[0] must be"),
        ([{"type": "web_search"}], None, "of type function"),
        ([tool("")], None, "must have a name"),
        ([tool("a", parameters=[1])], None, "JSON schema"),
        ([tool("a"), tool("a")], None, "two functions named a"),
        (TOOLS, "sometimes", "tool_choice must be"),
        (TOOLS, {"type": "function", "function": {"name": "other"}}, "'other', which is not in tools"),
        (TOOLS, {"type": "allowed_tools", "allowed_tools": {"tools": []}}, "tool_choice must be"),
        (TOOLS, {"type": "function", "function": 5}, "not in tools"),
    ],
)
def test_what_is_refused(tools: Any, choice: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said.replace("[", r"\[")):
        tools_of(tools, choice, None)


def test_the_template_for_tools() -> None:
    tokenizer = Tokenizer(toy_tokenizer().backend, template="plain", tool_template="with {{ tools[0] }}")
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.chat(messages) == "plain"
    assert tokenizer.chat(messages, tools=["f"]) == "with f"
    for number in range(6):  # more than are kept
        assert tokenizer.chat(messages, chat_template=f"own {number}") == f"own {number}"
    assert tokenizer.chat(messages, tools=["f"]) == "with f"
