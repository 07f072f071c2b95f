"""MessagesRequest: the body of POST /v1/messages, and its translation to a chat of OpenAI's API."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError
from octavo.server.openai.protocol import ChatRequest, Whole
from octavo.server.translation import json_schema, passed_fields, text_block, text_of

# Hints about caching, speed, place and billing, and features of Anthropic's own service that are off when left out.
IGNORED = {"cache_control", "service_tier", "inference_geo", "speed", "diagnostics", "user_profile_id", "workspace_id"}


class Turn(BaseModel):
    """A message. Its content is text or an array of content blocks."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["user", "assistant", "system"]
    content: Any


class Tool(BaseModel):
    """A tool of the client. Tools that Anthropic's own service runs have a type other than "custom"."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    type: Literal["custom"] | None = None
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        """Return the tool in OpenAI's form."""
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}


class ToolChoice(BaseModel):
    """How the model may call tools. `name` is for the type "tool"."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def for_chat(self) -> Any:
        """Return OpenAI's `tool_choice`. Raises ApiError 400."""
        if self.type != "tool":
            return "required" if self.type == "any" else self.type
        if not self.name:
            raise ApiError(400, "tool_choice of type tool needs the name of a tool", "tool_choice.name")
        return {"type": "function", "function": {"name": self.name}}


class Thinking(BaseModel):
    """Whether the model thinks before it answers."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Whole | None = Field(None, ge=1)


class CountRequest(BaseModel):
    """The body of POST /v1/messages/count_tokens, and the part of MessagesRequest that makes the prompt."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: Any = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None

    def chat(self, config: ServerConfig) -> ChatRequest:
        """Return the body of the same chat in OpenAI's API. Raises ApiError 400."""
        return ChatRequest.from_json(self._chat_fields(), config)

    def _chat_fields(self) -> dict[str, Any]:
        body = passed_fields(self.model_extra, type(self).model_fields, IGNORED)
        body |= {"model": self.model, "messages": _messages(self.system, self.messages)}
        if self.messages[-1].role == "assistant":  # the answer continues it
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.tools:
            body["tools"] = [tool.for_chat() for tool in self.tools]
        if self.tool_choice and (self.tools or self.tool_choice.type not in ("auto", "none")):
            body["tool_choice"] = self.tool_choice.for_chat()
            if self.tool_choice.disable_parallel_tool_use:
                body["parallel_tool_calls"] = False
        if self.thinking:
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking.type != "disabled"}
        if form := (self.output_config or {}).get("format"):
            if not isinstance(form, dict) or form.get("type") != "json_schema":
                raise ApiError(400, "output_config.format should have the type json_schema", "output_config.format")
            body["response_format"] = json_schema(form.get("schema"))
        return body


class MessagesRequest(CountRequest):
    """The body of POST /v1/messages. Octavo's own sampling parameters may be added to Anthropic's."""

    max_tokens: Annotated[Whole, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: list[str] | None = None

    def _chat_fields(self) -> dict[str, Any]:
        user = (self.metadata or {}).get("user_id")
        body = super()._chat_fields() | {"max_completion_tokens": self.max_tokens, "stream": bool(self.stream)}
        return body | {"stop": self.stop_sequences or None, "user": user}


def _messages(system: Any, turns: list[Turn]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": text_of(system, "system")})
    for i, turn in enumerate(turns):
        path = f"messages[{i}].content"
        if isinstance(turn.content, list) and turn.role == "user":
            messages += _user_messages(turn.content, path)
        elif isinstance(turn.content, list) and turn.role == "assistant":
            messages.append(_assistant_message(turn.content, path))
        else:
            messages.append({"role": turn.role, "content": text_of(turn.content, path)})
    return messages


def _user_messages(blocks: list[Any], path: str) -> list[dict[str, Any]]:
    """Return a message for every tool result, and one for the text."""
    messages: list[dict[str, Any]] = []
    texts = []
    for i, block in enumerate(blocks):
        where = f"{path}[{i}]"
        if isinstance(block, dict) and block.get("type") == "tool_result":
            content = text_of(block.get("content") or "", f"{where}.content")
            messages.append({"role": "tool", "content": content, "tool_call_id": _string(block, "tool_use_id", where)})
        else:
            texts.append(text_block(block, where))
    if texts or not messages:
        messages.append({"role": "user", "content": text_of(texts, path)})
    return messages


def _assistant_message(blocks: list[Any], path: str) -> dict[str, Any]:
    """Return an assistant's message. Its thinking is left out, as most templates do with that of earlier turns."""
    texts, calls = [], []
    for i, block in enumerate(blocks):
        where = f"{path}[{i}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use":
            function = {"name": _string(block, "name", where), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": _string(block, "id", where), "type": "function", "function": function})
        elif kind not in ("thinking", "redacted_thinking"):
            texts.append(text_block(block, where))
    message: dict[str, Any] = {"role": "assistant", "content": text_of(texts, path)}
    return message | {"tool_calls": calls} if calls else message


def _string(block: dict[str, Any], name: str, path: str) -> str:
    if not isinstance(value := block.get(name), str):
        raise ApiError(400, f"{path}.{name} should be a string", f"{path}.{name}")
    return value
