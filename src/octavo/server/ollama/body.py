"""Bodies of Ollama's API, and their translation to those of OpenAI's routes."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError
from octavo.server.openai.protocol import ChatRequest, CompletionRequest
from octavo.server.translation import json_schema, passed_fields

# Options about loading a model, which the server's settings decide, and neutral ones.
IGNORED = {
    *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "numa", "low_vram", "f16_kv", "use_mmap"),
    *("use_mlock", "vocab_only", "logits_all", "embedding_only", "num_keep", "penalize_newline", "repeat_last_n"),
    *("mirostat_eta", "mirostat_tau", "draft_num_predict"),
}
OPTIONS = {"num_predict", "stop", "repeat_penalty", "tfs_z", "typical_p"}


class Body(BaseModel):
    """The fields that /api/chat and /api/generate share. An answer is streamed unless `stream` is false."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    stream: bool | None = None
    options: dict[str, Any] | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: bool | str | None = None
    keep_alive: Any = None

    @property
    def is_stream(self) -> bool:
        """Return whether the answer is to be streamed."""
        return self.stream is not False

    def _shared_fields(self, model: str) -> dict[str, Any]:
        options = self.options or {}
        foreign = {name: value for name, value in options.items() if name not in OPTIONS}
        body = passed_fields(self.model_extra, type(self).model_fields, ())
        body |= passed_fields(foreign, OPTIONS, IGNORED)
        for name in ("tfs_z", "typical_p"):
            if options.get(name) not in (None, 1, 1.0):
                raise ApiError(400, f"options.{name} is not supported by this server", name)
        body |= {"model": model, "stream": self.is_stream, "stop": options.get("stop") or None}
        body["repetition_penalty"] = options.get("repeat_penalty") or body.get("repetition_penalty")
        limit = options.get("num_predict")
        if not (isinstance(limit, int) and limit < 1):  # -1: no limit
            body["max_tokens"] = limit
        if self.format:
            is_schema = isinstance(self.format, dict)
            body["response_format"] = json_schema(self.format) if is_schema else {"type": "json_object"}
        return body

    def _chat(self, model: str, messages: list[Any], tools: Any, config: ServerConfig) -> ChatRequest:
        body = self._shared_fields(model) | {"messages": messages}
        if tools:
            body["tools"] = tools
        if self.think is not None:
            body["chat_template_kwargs"] = {"enable_thinking": bool(self.think)}
        if isinstance(self.think, str):
            body["reasoning_effort"] = self.think
        return ChatRequest.from_json(body, config)


class ChatBody(Body):
    """The body of POST /api/chat."""

    messages: list[Any] | None = None
    tools: list[dict[str, Any]] | None = None

    def chat(self, model: str, config: ServerConfig) -> ChatRequest:
        """Return the body of the same chat in OpenAI's API, for a model. Raises ApiError 400."""
        return self._chat(model, _messages(self.messages or []), self.tools, config)


class GenerateBody(Body):
    """The body of POST /api/generate."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[Any] | None = None
    raw: bool | None = None

    def check(self) -> None:
        """Raise ApiError 400 for a field that would change the answer and is not supported."""
        for name in ("template", "context", "images"):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported by this server", name)

    @property
    def is_chat(self) -> bool:
        """Return whether the prompt is a user's message, rather than the text that the model continues."""
        return not (self.raw or self.suffix)

    def chat(self, model: str, config: ServerConfig) -> ChatRequest:
        """Return the prompt as a chat of OpenAI's API, for a model. Raises ApiError 400."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self._chat(model, [*system, {"role": "user", "content": self.prompt}], None, config)

    def completion(self, model: str, config: ServerConfig) -> CompletionRequest:
        """Return the same completion in OpenAI's API, for a model. Raises ApiError 400."""
        body = self._shared_fields(model) | {"prompt": self.prompt, "suffix": self.suffix or None}
        return CompletionRequest.from_json(body, config)


def _messages(messages: list[Any]) -> list[Any]:
    """Return messages in OpenAI's form, in which each tool call has an id, and each result the id of its call."""
    translated: list[Any] = []
    unanswered: list[str] = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ApiError(400, f"messages[{i}] should be an object", f"messages[{i}]")
        if message.get("images"):
            raise ApiError(400, f"messages[{i}] has images: this server's models read only text", f"messages[{i}]")
        known = {name: value for name, value in message.items() if name not in ("images", "thinking", "tool_name")}
        if calls := message.get("tool_calls"):
            known["tool_calls"] = _calls(calls, i)
            unanswered += [call["id"] for call in known["tool_calls"]]
        if message.get("role") == "tool" and unanswered:
            known.setdefault("tool_call_id", unanswered.pop(0))
        translated.append(known)
    return translated


def _calls(calls: Any, i: int) -> list[dict[str, Any]]:
    translated = []
    for j, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            path = f"messages[{i}].tool_calls[{j}]"
            raise ApiError(400, f"{path} should have a function with a name", path)
        arguments = json.dumps(function.get("arguments") or {})
        function = {"name": function["name"], "arguments": arguments}
        translated.append({"id": f"call_{i}_{j}", "type": "function", "function": function})
    return translated
