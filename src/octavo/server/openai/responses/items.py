"""Items of the Responses API: check those of a request, and turn items into the messages of a chat.

Stored items have the form in which GET /v1/responses/{id}/input_items returns them.
"""

import uuid
from collections.abc import Sequence
from typing import Any

from octavo.server.errors import ApiError

Item = dict[str, Any]

ROLES = ("user", "assistant", "system", "developer")
STATUSES = ("in_progress", "completed", "incomplete")
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Types of content parts -> the field with their text."""

_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
"""Types of items -> the beginning of their ids."""


def output_id(kind: str, response_id: str, index: int) -> str:
    """Return the id of an output item. It contains the response's id, see `response_of`.

    Args:
        kind: the item's type.
        index: its position in the response's output.
    """
    return f"{_PREFIXES[kind]}_{response_id.removeprefix('resp_')}{index:04x}"


def response_of(item_id: str) -> str:
    """Return the id of the response that has an output item of this id; any text if `output_id` did not make the id."""
    return f"resp_{item_id.rpartition('_')[2][:-4]}"


def references(given: Any) -> set[str]:
    """Return the ids in the item_reference items of a request's `input`."""
    if not isinstance(given, list):
        return set()
    items = (item for item in given if isinstance(item, dict) and item.get("type") == "item_reference")
    return {id for item in items if isinstance(id := item.get("id"), str)}


def input_items(given: Any, referenced: dict[str, Item]) -> list[Item]:
    """Return a request's `input`, a text, a list of items or None, as items to store.

    Args:
        referenced: the stored items by id that item_reference items may name.

    Raises ApiError 400 with the path of the field at fault.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    given = [] if given is None else given
    if not isinstance(given, list):
        raise ApiError(400, "input should be a string or an array of items", "input")
    return [_input_item(item, f"input[{i}]", referenced) for i, item in enumerate(given)]


def _input_item(item: Any, path: str, referenced: dict[str, Item]) -> Item:
    if not isinstance(item, dict):
        raise ApiError(400, f"{path} should be an object", path)
    kind = item.get("type") or ("message" if "role" in item else None)
    match kind:
        case "message":
            fields = _message(item, path)
        case "function_call":
            fields = {name: _text(item, name, path) for name in ("call_id", "name", "arguments")}
        case "function_call_output":
            output = item.get("output")
            output = output if isinstance(output, str) else _parts(output, f"{path}.output", "input_text")
            fields = {"call_id": _text(item, "call_id", path), "output": output}
        case "reasoning":
            fields = {
                "summary": _parts(item.get("summary") or [], f"{path}.summary", "summary_text"),
                "content": _parts(item.get("content") or [], f"{path}.content", "reasoning_text"),
            }
        case "item_reference":
            if (id := _text(item, "id", path)) not in referenced:
                raise ApiError(404, f"{path}.id names no stored item", f"{path}.id", "item_not_found")
            return referenced[id]
        case None:
            raise ApiError(400, f"{path}.type is missing", f"{path}.type")
        case _:
            supported = "message, function_call, function_call_output, reasoning and item_reference"
            message = f"{path} has the type {kind!r}; this server supports {supported}"
            raise ApiError(400, message, f"{path}.type", "unsupported_field")
    given, status = item.get("id"), item.get("status")
    return {
        "id": given if isinstance(given, str) and given else f"{_PREFIXES[kind]}_{uuid.uuid4().hex}",
        "type": kind,
        "status": status if status in STATUSES else "completed",
        **fields,
    }


def _message(item: Item, path: str) -> Item:
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise ApiError(400, f"{path}.role should be one of {', '.join(ROLES)}", f"{path}.role")
    kind = "output_text" if role == "assistant" else "input_text"
    if isinstance(content, str):
        return {"role": role, "content": [_part(kind, content)]}
    return {"role": role, "content": _parts(content, f"{path}.content", kind)}


def _parts(content: Any, path: str, kind: str) -> list[Item]:
    """Return content parts, all as parts of type `kind`. Raises ApiError 400 for a part that is not text."""
    if not isinstance(content, list):
        raise ApiError(400, f"{path} should be {'a string or ' if kind == 'input_text' else ''}an array", path)
    parts = []
    for i, part in enumerate(content):
        given = part.get("type") if isinstance(part, dict) else None
        if given != kind and given not in _TEXT_PARTS:
            where = f"{path}[{i}].type"
            raise ApiError(400, f"{where} is {given!r}: only text is supported", where, "unsupported_field")
        parts.append(_part(kind, _text(part, _TEXT_PARTS.get(given, "text"), f"{path}[{i}]")))
    return parts


def _part(kind: str, text: str) -> Item:
    part: Item = {"type": kind, "text": text}
    return part | {"annotations": []} if kind == "output_text" else part


def _text(item: Item, name: str, path: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ApiError(400, f"{path}.{name} should be a string", f"{path}.{name}")
    return value


def chat_messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return items as the messages of a chat completion.

    A chat has one message for what the model generates in one turn, so reasoning, a text and the function calls that
    follow one another become one message of the assistant.
    """
    messages: list[dict[str, Any]] = []
    for item in items:
        match item["type"]:
            case "message" if item["role"] != "assistant":
                texts = [part["text"] for part in item["content"]]
                parts = [{"type": "text", "text": text} for text in texts]
                messages.append({"role": item["role"], "content": texts[0] if len(texts) == 1 else parts})
            case "message":
                message = _assistant(messages, without=("content", "tool_calls"))
                message["content"] = "".join(part["text"] for part in item["content"])
            case "function_call":
                message = _assistant(messages)
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = item["output"]
                text = output if isinstance(output, str) else "".join(part["text"] for part in output)
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
            case "reasoning":
                text = "".join(part["text"] for part in item.get("content") or item["summary"])
                if text:  # OpenAI's own models return it encrypted, which is of no use here
                    message = _assistant(messages, without=("content", "tool_calls", "reasoning_content"))
                    message["reasoning_content"] = text
    return messages


def _assistant(messages: list[dict[str, Any]], without: Sequence[str] = ()) -> dict[str, Any]:
    """Return the last message if it is the assistant's and has none of the fields in `without`, or else a new one."""
    if not messages or messages[-1]["role"] != "assistant" or any(messages[-1].get(name) for name in without):
        messages.append({"role": "assistant", "content": None})
    return messages[-1]
