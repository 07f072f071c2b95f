"""POST /v1/chat/completions."""

from collections.abc import Iterator
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.outputs import CompletionOutput
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.openapi.operation import MODEL, Operation
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
        chunk = _chunk(generation)
        choices = _Choices(generation, chunk)
        return EventStream(generation, chunk, choices, body.include_usage, body.continuous_usage)
    return await _whole(generation)


async def _whole(generation: ChatGeneration) -> Response:
    [output] = await generation.whole()
    top, with_ids = generation.params.logprobs, generation.options.token_ids
    choices = [
        replies.ChatChoice(
            index=answer.index,
            message=_message(answer, bool(generation.body.functions)),
            logprobs=generation.logprobs.chat(completion, top),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
            token_ids=completion.token_ids if with_ids else msgspec.UNSET,
        )
        for answer, completion in zip(generation.answers(output.outputs), output.outputs, strict=True)
    ]
    scored = generation.scored.get(0)
    return generation.json(
        replies.Chat(
            id=generation.id,
            created=generation.created,
            model=generation.model,
            system_fingerprint=generation.fingerprint,
            choices=choices,
            prompt_logprobs=generation.placed(scored.known) if scored else msgspec.UNSET,
            prompt_token_ids=generation.prompts[0] if with_ids else msgspec.UNSET,
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
    """Returns the choices of an increment. As in OpenAI's API, the role, new text and the end get a chunk each.

    Args:
        chunk: the chunk in which each choice is sent before the next one is taken. The first one has the prompt's token
            ids, if the request wants them.
    """

    def __init__(self, generation: ChatGeneration, chunk: replies.ChatChunk):
        self._generation, self._chunk = generation, chunk
        self._begun: set[int] = set()  # indices of completions
        if generation.options.token_ids:
            chunk.prompt_token_ids = generation.prompts[0]

    def __call__(self, _: int, new: CompletionOutput) -> Iterator[replies.ChunkChoice]:
        if new.index not in self._begun:
            self._begun.add(new.index)
            yield replies.ChunkChoice(new.index, replies.Delta(role="assistant", content=""))
            self._chunk.prompt_token_ids = msgspec.UNSET
        generation = self._generation
        logprobs = generation.logprobs.chat(new, generation.params.logprobs)
        ids = new.token_ids if generation.options.token_ids else msgspec.UNSET
        for event in generation.events(new):
            delta = _older_delta(event) if generation.body.functions else _delta(event)
            yield replies.ChunkChoice(new.index, delta, logprobs, token_ids=ids)
            logprobs, ids = None, msgspec.UNSET
        if (logprobs and logprobs.content) or ids:  # of tokens that complete no text
            yield replies.ChunkChoice(new.index, replies.Delta(content=""), logprobs, token_ids=ids)
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


def _older_delta(event: AnswerEvent) -> replies.Delta:
    """Return the delta in the form for requests with `functions`, which has the first call only."""
    match event:
        case ToolCallStart(0, _, name):
            return replies.Delta(function_call=replies.FunctionCall(name, ""))
        case ArgumentsDelta(0, text):
            return replies.Delta(function_call=replies.FunctionCall(arguments=text))
        case ToolCallStart() | ArgumentsDelta():
            return replies.Delta()
        case _:
            return _delta(event)


def _message(answer: Answer, has_functions: bool) -> replies.ChatMessage:
    message = replies.ChatMessage(content=answer.text)
    if answer.reasoning:
        message.reasoning_content = message.reasoning = answer.reasoning
    if answer.tool_calls and has_functions:
        message.content = answer.text or None
        message.function_call = replies.FunctionCall(answer.tool_calls[0].name, answer.tool_calls[0].arguments)
    elif answer.tool_calls:
        message.content = answer.text or None
        message.tool_calls = [
            replies.ToolCall(call.id, replies.FunctionCall(call.name, call.arguments)) for call in answer.tool_calls
        ]
    return message
