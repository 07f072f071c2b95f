"""Tools in chats: the functions of a request, which of them may or must be called, and the constraint that follows."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from octavo.errors import InvalidRequest
from octavo.params import StructuredOutputs

MAX_TOOLS = 512

_PROMPT = """You can call these functions:
{tools}
To call some of them, answer with nothing but a JSON array of objects, without any other text:
[{{"name": "the function's name", "arguments": {{"parameter": "value"}}}}]
If no function is needed, answer in plain text."""

# Formats whose calls a strict schema can constrain in free text: trigger, text before the arguments, text after them.
_TAGS = {
    "hermes": ("<tool_call>", '<tool_call>\n{{"name": {name}, "arguments": ', "}}\n</tool_call>"),
}


@dataclass(frozen=True)
class Tools:
    """The functions that the model may call.

    Attributes:
        given: The tools for the template, as in the request.
        schemas: The parameters as JSON schema, by function, of those that may be called.
        mode: Whether the model may call functions, must call one or several, must call the only one, or may not.
        strict: The functions whose arguments must follow the schema.
        parallel: Whether the model may call several.
    """

    given: list[dict[str, Any]]
    schemas: dict[str, Any]
    mode: Literal["none", "auto", "required", "named"]
    strict: frozenset[str]
    parallel: bool

    @property
    def is_forced(self) -> bool:
        """Return whether the answer must be calls."""
        return self.mode in ("required", "named")

    def constraint(self, parser: str) -> StructuredOutputs | None:
        """Return the constraint of the answer, None if there is none. `parser` names the format of calls.

        A named function: the answer is its arguments. Required calls: a JSON array of objects with "name" and
        "parameters", as vLLM has it. Otherwise, strict functions: the arguments of calls in the model's own format,
        if that has tags around a call.
        """
        if self.mode == "named":
            return StructuredOutputs(json=next(iter(self.schemas.values())))
        if self.mode == "required":
            return StructuredOutputs(json=self._array())
        if self.mode == "auto" and self.strict and parser in _TAGS:
            trigger, begin, end = _TAGS[parser]
            structures = [
                {
                    "begin": begin.format(name=json.dumps(name, ensure_ascii=False)),
                    "schema": schema if name in self.strict else {"type": "object"},
                    "end": end.format(),
                }
                for name, schema in self.schemas.items()
            ]
            return StructuredOutputs(structural_tag={"structures": structures, "triggers": [trigger]})
        return None

    def _array(self) -> dict[str, Any]:
        """Return the schema of an array of calls."""
        calls, definitions = [], {}
        for number, (name, schema) in enumerate(self.schemas.items()):
            own = f"function{number}"  # names in references must not need escapes
            if _has_references(schema):
                definitions[own] = _moved(schema, f"#/$defs/{own}")
                schema = {"$ref": f"#/$defs/{own}"}
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"type": "string", "enum": [name]}, "parameters": schema},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
            )
        array: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        if not self.parallel:
            array["maxItems"] = 1
        return array | ({"$defs": definitions} if definitions else {})

    def instructions(self) -> str:
        """Return a system message that explains the functions to a model whose template does not."""
        return _PROMPT.format(tools=json.dumps([tool["function"] for tool in self.given], ensure_ascii=False))


def tools_of(tools: Any, choice: Any, parallel: bool | None) -> Tools | None:
    """Return the tools of a request, None if it has none. Raises InvalidRequest.

    Args:
        tools, choice, parallel: The fields tools, tool_choice and parallel_tool_calls of the body.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools", "tool_choice")
        return None
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools must be a list of at most {MAX_TOOLS} tools", "tools")
    schemas, strict = {}, set()
    for i, tool in enumerate(tools):
        function = _function(tool, i)
        name = function["name"]
        if name in schemas:
            raise InvalidRequest(f"tools has two functions named {name}", "tools")
        schemas[name] = function.get("parameters") or {"type": "object", "properties": {}}
        if function.get("strict"):
            strict.add(name)
    mode, names = _choice(choice, list(schemas))
    allowed = {name: schemas[name] for name in names}
    return Tools(tools, allowed, mode, frozenset(strict & allowed.keys()), parallel is not False)


def _function(tool: Any, i: int) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        raise InvalidRequest(f"tools[{i}] must be an object of type function", "tools")
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not 1 <= len(name) <= 256:
        raise InvalidRequest(f"tools[{i}].function must have a name of 1 to 256 characters", "tools")
    assert isinstance(function, dict)
    if not isinstance(function.get("parameters") or {}, dict):
        raise InvalidRequest(f"tools[{i}].function.parameters must be a JSON schema", "tools")
    return function


def _choice(choice: Any, names: list[str]) -> tuple[Literal["none", "auto", "required", "named"], list[str]]:
    """Return the mode of a tool_choice, and the functions that may be called. Raises InvalidRequest."""
    if choice is None or choice == "auto":
        return "auto", names
    if choice == "none":
        return "none", []
    if choice == "required":
        return "required", names
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return "named", _named([choice], names)
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        tools = allowed.get("tools") if isinstance(allowed, dict) else None
        mode = allowed.get("mode", "auto") if isinstance(allowed, dict) else None
        if isinstance(tools, list) and tools and mode in ("auto", "required"):
            return mode, _named(tools, names)
    raise InvalidRequest(
        'tool_choice must be none, auto, required, {"type": "function", "function": {"name": ...}} or allowed_tools',
        "tool_choice",
    )


def _named(tools: list[Any], names: list[str]) -> list[str]:
    """Return the names of functions in a tool_choice. Raises InvalidRequest."""
    found = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if name not in names:
            raise InvalidRequest(f"tool_choice names the function {name!r}, which is not in tools", "tool_choice")
        found.append(name)
    return found


def _has_references(schema: Any) -> bool:
    if isinstance(schema, dict):
        return isinstance(schema.get("$ref"), str) or any(map(_has_references, schema.values()))
    return isinstance(schema, list) and any(map(_has_references, schema))


def _moved(schema: Any, root: str) -> Any:
    """Return a schema whose references to its own root "#" are to `root`."""
    if isinstance(schema, dict):
        return {
            key: root + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, root)
            for key, value in schema.items()
        }
    return [_moved(each, root) for each in schema] if isinstance(schema, list) else schema
