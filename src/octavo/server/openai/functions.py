"""OpenAI's older form of tools in chats: `functions` and `function_call`, translated to `tools` and `tool_choice`."""

from typing import Any

from octavo.errors import InvalidRequest


def with_tools(body: dict[str, Any]) -> dict[str, Any]:
    """Return a chat's body with `tools` in place of its `functions`, if it has any. Raises InvalidRequest."""
    functions, choice = body.get("functions"), body.get("function_call")
    if not functions:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("function_call needs functions", "function_call")
        return body
    if body.get("tools"):
        raise InvalidRequest("functions and tools exclude each other: functions is the older name", "functions")
    if not isinstance(functions, list):
        raise InvalidRequest("functions must be a list", "functions")
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    tools = [{"type": "function", "function": function} for function in functions]
    return {**body, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}


def with_tool_calls(messages: list[Any]) -> list[Any]:
    """Return messages with `tool_calls` and the role "tool" in place of `function_call` and the role "function"."""
    translated, call = [], ""
    for i, message in enumerate(messages):
        if isinstance(message, dict) and isinstance(message.get("function_call"), dict):
            call = f"call_{i}"
            calls = [{"id": call, "type": "function", "function": message["function_call"]}]
            message = {**message, "function_call": None, "tool_calls": calls}
        elif isinstance(message, dict) and message.get("role") == "function":
            message = {**message, "role": "tool", "tool_call_id": call}
        translated.append(message)
    return translated
