"""The body of POST /v1/responses: its own fields, and its translation to the body of a chat completion.

Sampling fields of vLLM and Octavo's own terms (seed, top_k, stop, priority, ...) are those of chat completions.
"""

import contextlib
import re
from collections.abc import Generator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from octavo.errors import InvalidRequest
from octavo.params import MAX_LOGPROBS
from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError, invalid_body
from octavo.server.openai.neutral_fields import ANY, without_neutral
from octavo.server.openai.protocol import MAX_ENTRIES, MAX_TEXT, ChatRequest, Parameters, Strict, Whole

from .items import Item, chat_messages

MAX_METADATA = 16  # pairs
MAX_METADATA_KEY = 64  # characters
MAX_METADATA_VALUE = 512  # characters
LOGPROBS = "message.output_text.logprobs"

_CHAT_NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "logprobs": f"include: [{LOGPROBS!r}]",
}
"""Fields of chat completions -> their names here."""

_NO_CHAT_FIELDS = ("kv_cache_state", "continue_final_message", "add_generation_prompt", "echo", "best_of", "functions")
"""Fields of chat completions that have no counterpart here."""

_UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys(("conversation", "prompt", "context_management", "moderation", "personality"), ()),
    "n": (1,),
    **dict.fromkeys(("image", "background_options", "access_programs"), ANY),  # hints that concern OpenAI's servers
}
"""Fields of OpenAI's API that this server does not implement -> their neutral values, see neutral_fields."""

_TOOL_NEUTRAL = {
    **dict.fromkeys(("output_schema",), ANY),
    "allowed_callers": (["direct"],),
    **dict.fromkeys(("defer_loading", "async"), (False,)),
}
_NUMBERED = re.compile(r"messages\[\d+\]")


class Reasoning(Strict):
    """How the model reasons. `generate_summary` is the older name of `summary`."""

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: Literal["standard"] | None = None


class TextFormat(Strict):
    """The format of the answer's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Strict):
    """The field `text`."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class StreamOptions(Strict):
    """Options of a stream, accepted without effect: this server adds no obfuscation to its events."""

    include_obfuscation: bool | None = None
    include_usage: bool | None = None


def _metadata(value: Any) -> Any:
    if isinstance(value, dict):
        if len(value) > MAX_METADATA:
            raise ValueError(f"has more than {MAX_METADATA} pairs")
        for key, text in value.items():
            if len(key) > MAX_METADATA_KEY or (isinstance(text, str) and len(text) > MAX_METADATA_VALUE):
                raise ValueError(
                    f"has a key longer than {MAX_METADATA_KEY} characters or a value longer than {MAX_METADATA_VALUE}"
                )
    return value


def _with_sampling(schema: dict[str, Any]) -> None:
    """Put the fields in `sampling` where they are in a body: beside the others."""
    properties = schema["properties"]
    del properties["sampling"]
    for name, described in Parameters.model_json_schema()["properties"].items():
        if name not in _CHAT_NAMES and name not in _UNSUPPORTED:
            properties.setdefault(name, described)


class ResponsesRequest(Strict):
    """The body of POST /v1/responses and /v1/responses/input_tokens, without the fields in `sampling`.

    Attributes:
        sampling: fields that are passed to ChatRequest unchanged.
    """

    model_config = ConfigDict(json_schema_extra=_with_sampling)

    input: Any = None
    instructions: str | None = None
    model: str | None = None
    previous_response_id: Annotated[str | None, Field(max_length=MAX_TEXT)] = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[str] | None = None
    max_output_tokens: Annotated[Whole | None, Field(ge=1)] = None
    max_tool_calls: Whole | None = None  # limits built-in tools, of which there are none
    top_logprobs: Annotated[Whole | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    text: TextConfig | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_metadata)] = None
    user: Annotated[str | None, Field(max_length=MAX_TEXT)] = None
    safety_identifier: Annotated[str | None, Field(max_length=MAX_TEXT)] = None
    service_tier: Annotated[str | None, Field(max_length=MAX_TEXT)] = None
    prompt_cache_key: Annotated[str | None, Field(max_length=MAX_TEXT)] = None
    prompt_cache_retention: Annotated[str | None, Field(max_length=MAX_TEXT)] = None
    prompt_cache_options: dict[str, Any] | None = None
    sampling: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def from_json(cls, body: Any, config: ServerConfig) -> Self:
        """Make a request of a parsed body. Raises ApiError 400 if one of its own fields is invalid."""
        if not isinstance(body, dict):
            raise ApiError(400, "the body should be an object", code="invalid_body")
        others = {name: value for name, value in body.items() if name not in cls.model_fields or name == "sampling"}
        without_neutral({name: others.pop(name) for name in _UNSUPPORTED if name in others}, (), _UNSUPPORTED)
        for name in [name for name in (*_CHAT_NAMES, *_NO_CHAT_FIELDS) if name in others]:
            if others.pop(name) not in (None, False):
                hint = f"; did you mean {_CHAT_NAMES[name]}?" if name in _CHAT_NAMES else ""
                raise ApiError(400, f"unknown field {name}{hint}", name, "unknown_field")
        own = {name: value for name, value in body.items() if name in cls.model_fields and name not in others}
        _check_sizes(own, config)
        try:
            request = cls.model_validate({**own, "sampling": others})
        except ValidationError as error:
            raise invalid_body(error) from None
        request._check()
        return request

    def _check(self) -> None:
        """Raise ApiError 400 for fields that contradict one another or name what this server does not have."""
        if self.background and self.store is False:
            raise ApiError(400, "background needs store to be true", "background")
        if (self.prompt_cache_options or {}).get("prewarm"):
            path = "prompt_cache_options.prewarm"
            raise ApiError(400, f"{path} is not supported by this server", path, "unsupported_field")
        text_format = self.text.format if self.text else None
        if text_format and text_format.type == "json_schema" and text_format.json_schema is None:
            raise ApiError(400, "text.format.schema is missing", "text.format.schema")
        for i, tool in enumerate(self.tools or []):
            if (kind := tool.get("type")) != "function":
                message = f"tools[{i}] has the type {kind!r}; this server supports only functions"
                raise ApiError(400, message, f"tools[{i}].type", "unsupported_field")

    @property
    def stored(self) -> bool:
        """Return whether to store the response."""
        return self.store is not False

    @property
    def summarizes(self) -> bool:
        """Return whether the reasoning is to be returned as its summary."""
        return bool(self.reasoning and (self.reasoning.summary or self.reasoning.generate_summary))

    def chat(self, items: Sequence[Item], config: ServerConfig) -> ChatRequest:
        """Return the chat completion that answers `items`, the whole conversation. Raises ApiError 400."""
        messages = chat_messages(items)
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        if not messages:
            raise ApiError(400, "input is missing or empty", "input")
        body = {**self.sampling, "messages": messages, **self.translated()}
        return ChatRequest.from_json(body, config)

    def translated(self) -> dict[str, Any]:
        """Return the fields that are named or written differently in chat completions."""
        logprobs = bool(self.top_logprobs) or LOGPROBS in (self.include or [])
        text = self.text or TextConfig()
        fields = {
            "model": self.model,
            "user": self.user,
            "safety_identifier": self.safety_identifier,
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": True if logprobs else None,
            "top_logprobs": (self.top_logprobs or 0) if logprobs else None,
            "tools": [_chat_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools or [])] or None,
            "tool_choice": _chat_tool_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": _chat_format(text.format),
            "verbosity": text.verbosity,
        }
        return {name: value for name, value in fields.items() if value is not None}


def _check_sizes(body: dict[str, Any], config: ServerConfig) -> None:
    """Raise ApiError 400 if the request has too many items, content parts, or entries of another field."""
    for name, value in body.items():
        if name != "input" and isinstance(value, (list, dict)) and len(value) > MAX_ENTRIES:
            raise ApiError(400, f"{name} has {len(value)} entries; the limit is {MAX_ENTRIES}", name)
    given = body.get("input")
    if not isinstance(given, list):
        return
    if len(given) > config.max_messages:
        raise ApiError(400, f"input has more than {config.max_messages} items (max_messages)", "input")
    lists = [item.get(name) for item in given if isinstance(item, dict) for name in ("content", "output", "summary")]
    if sum(len(parts) for parts in lists if isinstance(parts, list)) > config.max_content_parts:
        raise ApiError(
            400, f"input has more than {config.max_content_parts} content parts (max_content_parts)", "input"
        )


def _chat_tool(tool: dict[str, Any], path: str) -> dict[str, Any]:
    known = ("type", "name", "description", "parameters", "strict")
    function = without_neutral(tool, known, _TOOL_NEUTRAL, path)
    function = {name: value for name, value in function.items() if name != "type" and value is not None}
    return {"type": "function", "function": function}


def _chat_tool_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    match choice.get("type"):
        case "function":
            return {"type": "function", "function": {"name": choice.get("name")}}
        case "allowed_tools":
            tools = choice.get("tools")
            if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
                raise ApiError(400, "tool_choice.tools should be an array of objects", "tool_choice.tools")
            named = [{"type": "function", "function": {"name": tool.get("name")}} for tool in tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
        case kind:
            message = f"tool_choice has the type {kind!r}; this server supports function and allowed_tools"
            raise ApiError(400, message, "tool_choice.type", "unsupported_field")


def _chat_format(text_format: TextFormat | None) -> dict[str, Any] | None:
    if text_format is None or text_format.type == "text":
        return None
    if text_format.type == "json_object":
        return {"type": "json_object"}
    schema = {
        "name": text_format.name or "response",
        "description": text_format.description,
        "schema": text_format.json_schema,
        "strict": text_format.strict,
    }
    given = {name: value for name, value in schema.items() if value is not None}
    return {"type": "json_schema", "json_schema": given}


@contextlib.contextmanager
def own_names() -> Generator[None, None, None]:
    """Give fields in errors about chat completions, which are raised in this block, the names that they have here."""

    def own(text: str) -> str:
        text = _NUMBERED.sub("input", text)
        for chat_name, name in _CHAT_NAMES.items():
            text = re.sub(rf"^{chat_name}\b", name, text)
        return text

    try:
        yield
    except (ApiError, InvalidRequest) as error:
        error.args = (own(str(error)),)
        error.param = own(error.param) if error.param else None
        raise
