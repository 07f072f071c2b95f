"""POST /api/chat and /api/generate. Answers are streamed as lines of JSON, by default."""

import json
import time
from datetime import UTC, datetime
from functools import partial
from typing import Any, NotRequired, TypedDict

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.async_llm import Increment
from octavo.outputs import CompletionOutput
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.errors import OLLAMA, ApiError, error_body
from octavo.server.openai import completions
from octavo.server.openai.chat_generation import ChatGeneration, prepare
from octavo.server.openai.events import GenerationStream
from octavo.server.openai.generation import Generation
from octavo.server.openai.protocol import tenant_of
from octavo.server.openai.replies import Json, encode
from octavo.server.openapi.operation import MODEL, Operation
from octavo.server.translation import parse
from octavo.text.answer import Answer, AnswerEvent, TextDelta

from .body import Body, ChatBody, GenerateBody
from .models import known_name

JSON_LINES = "application/x-ndjson"


class Line(TypedDict):
    """An answer, or a line of its stream, the last of which has counts of tokens, and durations in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: NotRequired[str]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]


class ChatLine(Line):
    """An answer to a chat, or a line of its stream."""

    message: dict[str, Any]


class GenerateLine(Line):
    """An answer to a prompt, or a line of its stream."""

    response: str
    thinking: NotRequired[str]


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""

    def described(summary: str, line: type, **more: Any) -> Operation:
        return Operation(tag="Ollama", summary=summary, reply=line, events=line, events_type=JSON_LINES, **more)

    limited = {"model": MODEL, "stream": False, "options": {"num_predict": 8}}
    messages = {"messages": [{"role": "user", "content": "Say hello."}]}
    answered = described("Answer a chat.", ChatLine, body=ChatBody, example=limited | messages)
    generated = described("Answer a prompt.", GenerateLine, body=GenerateBody, example=limited | {"prompt": "Hello"})
    return [
        route("POST", "/api/chat", partial(chat, api), answered),
        route("POST", "/api/generate", partial(generate, api), generated),
    ]


async def chat(api: Api, request: Request) -> Response:
    """Answer a chat; without messages, load the model. Raises ApiError, OctavoError."""
    body = parse(ChatBody, await _read(api, request))
    name = known_name(api, body.model)
    if not body.messages:
        return await _load(api, request, body, {"message": {"role": "assistant", "content": ""}})
    began = time.perf_counter()
    generation = await prepare(api, request, body.chat(name, api.config), RequestRecord.of(request.scope))
    return await _answer(body, _Lines(generation, body, is_chat=True, load_seconds=time.perf_counter() - began))


async def generate(api: Api, request: Request) -> Response:
    """Answer a prompt; without one, load the model. Raises ApiError, OctavoError."""
    body = parse(GenerateBody, await _read(api, request))
    body.check()
    name, record = known_name(api, body.model), RequestRecord.of(request.scope)
    if not body.prompt and not body.suffix:
        return await _load(api, request, body, {"response": ""})
    began = time.perf_counter()
    generation: Generation
    if body.is_chat:
        generation = await prepare(api, request, body.chat(name, api.config), record)
    else:
        generation = await completions.prepare(api, request, body.completion(name, api.config), record)
    return await _answer(body, _Lines(generation, body, is_chat=False, load_seconds=time.perf_counter() - began))


async def _read(api: Api, request: Request) -> Any:
    return await api.bodies.read_json(request, admit=api.fleet.check_capacity)


async def _load(api: Api, request: Request, body: Body, answer: dict[str, Any]) -> Response:
    if body.keep_alive in (0, "0"):
        raise ApiError(400, "keep_alive cannot unload a model: use /v1/admin/models", "keep_alive")
    terms = {"tenant": tenant_of(request.headers, None)}
    await api.model(RequestRecord.of(request.scope), known_name(api, body.model), None, terms)
    return Json({"model": body.model, "created_at": _now(), **answer, "done": True, "done_reason": "load"})


async def _answer(body: Body, lines: "_Lines") -> Response:
    if body.is_stream:
        return LineStream(lines)
    [output] = await lines.generation.whole()
    [new] = output.outputs
    answer = Answer()
    answer.add(lines.parts(new))
    return Json(lines.line(answer) | lines.end(new))


class _Lines:
    """The objects of an answer.

    Args:
        is_chat: whether they have the form of /api/chat.
        load_seconds: the time that loading the model and preparing the prompt took.
    """

    def __init__(self, generation: Generation, body: Body, is_chat: bool, load_seconds: float):
        self.generation = generation
        self._model = body.model
        self._is_chat = is_chat
        self._load_seconds = load_seconds

    def parts(self, new: CompletionOutput) -> list[AnswerEvent]:
        """Return the parts of the answer in an increment."""
        if isinstance(self.generation, ChatGeneration):
            return self.generation.events(new)
        return [TextDelta(new.text)] if new.text else []

    def line(self, answer: Answer) -> dict[str, Any]:
        """Return the object of a part of the answer, which goes on."""
        head: dict[str, Any] = {"model": self._model, "created_at": _now()}
        thinking = {"thinking": answer.reasoning} if answer.reasoning else {}
        if not self._is_chat:
            return head | {"response": answer.text, **thinking, "done": False}
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, **thinking}
        if answer.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "function": {"name": call.name, "arguments": _arguments(call.arguments)}}
                for call in answer.tool_calls
            ]
        return head | {"message": message, "done": False}

    def end(self, new: CompletionOutput) -> dict[str, Any]:
        """Return the fields of the last object. Durations are in nanoseconds."""
        record = self.generation.record
        total = time.perf_counter() - record.started
        prompt = min(record.time_to_first_token or 0.0, total)
        return {
            "done": True,
            "done_reason": "length" if new.finish_reason == "length" else "stop",
            "total_duration": int(total * 1e9),
            "load_duration": int(self._load_seconds * 1e9),
            "prompt_eval_count": record.prompt_tokens,
            "prompt_eval_duration": int(prompt * 1e9),
            "eval_count": record.completion_tokens,
            "eval_duration": max(0, int((total - prompt - self._load_seconds) * 1e9)),
        }


def _arguments(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):  # num_predict has cut the call off
        return {}


class LineStream(GenerationStream):
    """The stream of an answer. Tool calls come whole, at its end, since Ollama's API has no parts of calls."""

    media_type = JSON_LINES
    ping = b""  # clients parse every line

    def __init__(self, lines: _Lines):
        super().__init__(lines.generation)
        self._lines = lines
        self._whole = Answer()

    def events(self, increments: list[Increment]) -> bytes:
        """Return the lines of increments of the only completion."""
        lines = []
        for prompt, output in increments:
            self.generation.add(prompt, output)
            for new in output.outputs:
                parts = self._lines.parts(new)
                self._whole.add(parts)
                now = Answer()
                now.add(part for part in parts if not hasattr(part, "index"))
                if now.text or now.reasoning:
                    lines.append(self._lines.line(now))
                if new.finish_reason:
                    last = Answer(tool_calls=self._whole.tool_calls)
                    lines.append(self._lines.line(last) | self._lines.end(new))
        return b"".join(encode(line) + b"\n" for line in lines)

    def last_events(self) -> bytes:
        """Return nothing: the last line came with the end of the completion."""
        return b""

    def error_event(self, error: Exception) -> bytes:
        """Return an error as a line."""
        return encode(error_body(error, OLLAMA)[1]) + b"\n"


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
