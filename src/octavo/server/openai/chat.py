"""POST /v1/chat/completions."""

from collections.abc import Iterator
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.outputs import CompletionOutput, Logprob
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.openapi.operation import MODEL, Operation
from octavo.text import Tokenizer
from octavo.text.answer import Answer, AnswerEvent, ArgumentsDelta, ReasoningDelta, TextDelta, ToolCallStart

from . import replies
from .chat_generation import ChatGeneration, prepare
from .events import EventStream
from .protocol import ChatRequest


def routes(api: Api) -> list[Route]:
    """Return the route of this family."""
    operation = Operation(
        tag="OpenAI",
        summary="Answer a chat.",
        body=ChatRequest,
        example={"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8},
        reply=replies.Chat,
        events=replies.ChatChunk,
    )
    return [route("POST", "/v1/chat/completions", partial(chat_completions, api), operation)]


async def chat_completions(api: Api, request: Request) -> Response:
    """Answer a chat. Raises ApiError, OctavoError."""
    record = RequestRecord.of(request.scope)
    content = await api.bodies.read_json(request, admit=api.fleet.check_capacity)
    body = ChatRequest.from_json(content, api.config)
    generation = await prepare(api, request, body, record)
    if body.stream:
        choices = _Choices(generation)
        return EventStream(generation, _chunk(generation), choices, body.include_usage, body.continuous_usage)
    return await _whole(generation)


async def _whole(generation: ChatGeneration) -> Response:
    [output] = await generation.whole()
    tokenizer, top = generation.llm.tokenizer, generation.params.logprobs
    choices = [
        replies.ChatChoice(
            index=answer.index,
            message=_message(answer),
            logprobs=_logprobs(tokenizer, completion, top),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )
        for answer, completion in zip(generation.answers(output.outputs), output.outputs, strict=True)
    ]
    known = output.prompt_logprobs
    return replies.Json(
        replies.Chat(
            id=generation.id,
            created=generation.created,
            model=generation.model,
            system_fingerprint=generation.fingerprint,
            choices=choices,
            prompt_logprobs=replies.prompt_logprobs(known) if known else msgspec.UNSET,
            usage=generation.usage,
            seed=output.seed,
            kv_cache_state=generation.kept_state(),
        )
    )


def _chunk(generation: ChatGeneration) -> replies.ChatChunk:
    return replies.ChatChunk(
        id=generation.id,
        created=generation.created,
        model=generation.model,
        system_fingerprint=generation.fingerprint,
        choices=[],
    )


class _Choices:
    """Returns the choices of an increment. As in OpenAI's API, the role, new text and the end get a chunk each."""

    def __init__(self, generation: ChatGeneration):
        self._generation = generation
        self._begun: set[int] = set()  # indices of completions

    def __call__(self, _: int, new: CompletionOutput) -> Iterator[replies.ChunkChoice]:
        if new.index not in self._begun:
            self._begun.add(new.index)
            yield replies.ChunkChoice(new.index, replies.Delta(role="assistant", content=""))
        generation = self._generation
        logprobs = _logprobs(generation.llm.tokenizer, new, generation.params.logprobs)
        for event in generation.events(new):
            yield replies.ChunkChoice(new.index, _delta(event), logprobs)
            logprobs = None
        if logprobs and logprobs.content:  # of tokens that complete no text
            yield replies.ChunkChoice(new.index, replies.Delta(content=""), logprobs)
        if reason := generation.finish_reason(new):
            yield replies.ChunkChoice(new.index, replies.Delta(), finish_reason=reason, stop_reason=new.stop_reason)


def _delta(event: AnswerEvent) -> replies.Delta:
    match event:
        case TextDelta(text):
            return replies.Delta(content=text)
        case ReasoningDelta(text):
            return replies.Delta(reasoning_content=text, reasoning=text)
        case ToolCallStart(index, id, name):
            function = replies.FunctionCall(name, "")
            return replies.Delta(tool_calls=[replies.ToolCallDelta(index, function, id, "function")])
        case ArgumentsDelta(index, text):
            return replies.Delta(tool_calls=[replies.ToolCallDelta(index, replies.FunctionCall(arguments=text))])


def _message(answer: Answer) -> replies.ChatMessage:
    message = replies.ChatMessage(content=answer.text)
    if answer.reasoning:
        message.reasoning_content = message.reasoning = answer.reasoning
    if answer.tool_calls:
        message.content = answer.text or None
        message.tool_calls = [
            replies.ToolCall(call.id, replies.FunctionCall(call.name, call.arguments)) for call in answer.tool_calls
        ]
    return message


def _logprobs(tokenizer: Tokenizer, new: CompletionOutput, top: int | None) -> replies.ChatLogprobs | None:
    if new.logprobs is None:
        return None

    def spelled(token: int, entry: Logprob) -> tuple[str, float, list[int]]:
        return entry.decoded_token, entry.logprob, list(tokenizer.token_bytes(token))

    content = []
    for token, entries in zip(new.token_ids, new.logprobs, strict=True):
        likeliest = sorted(entries.items(), key=lambda item: item[1].rank)[:top]
        best = [replies.TopLogprob(*spelled(*item)) for item in likeliest]
        content.append(replies.TokenLogprob(*spelled(token, entries[token]), best))
    return replies.ChatLogprobs(content)
