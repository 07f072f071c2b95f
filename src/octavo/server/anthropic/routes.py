"""The routes of Anthropic's API."""

from functools import partial
from typing import Any, TypedDict

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.openai.answers import reasoning_parser
from octavo.server.openai.chat_generation import ChatGeneration, prepare
from octavo.server.openai.replies import Json
from octavo.server.openapi.operation import MODEL, Operation
from octavo.server.translation import parse

from .answer import Message, MessageStream, content_blocks, message
from .body import CountRequest, MessagesRequest

EVENT = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
"""The schema of an event of a stream: those of Anthropic's API, with further fields for each type."""


class TokenCount(TypedDict):
    """The number of tokens of a prompt."""

    input_tokens: int


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}]}
    answered = Operation(
        tag="Anthropic",
        summary="Answer a chat.",
        body=MessagesRequest,
        example=chat | {"max_tokens": 8},
        reply=Message,
        events=EVENT,
    )
    counted = Operation(
        tag="Anthropic",
        summary="Count the tokens of a chat's prompt.",
        body=CountRequest,
        example=chat,
        reply=TokenCount,
    )
    return [
        route("POST", "/v1/messages", partial(messages, api), answered),
        route("POST", "/v1/messages/count_tokens", partial(count_tokens, api), counted),
    ]


async def messages(api: Api, request: Request) -> Response:
    """Answer a chat. Raises ApiError, OctavoError."""
    generation = await _prepare(api, request, parse(MessagesRequest, await _read(api, request)))
    if generation.body.stream:
        return MessageStream(generation)
    [output] = await generation.whole()
    [answer] = generation.answers(output.outputs)
    return Json(message(generation, content_blocks(answer), answer.finish_reason, answer.stop_reason))


async def count_tokens(api: Api, request: Request) -> Response:
    """Answer with the number of tokens of a chat's prompt. Raises ApiError, OctavoError."""
    generation = await _prepare(api, request, parse(CountRequest, await _read(api, request)))
    return Json({"input_tokens": len(generation.prompts[0])})


async def _read(api: Api, request: Request) -> Any:
    return await api.bodies.read_json(request, admit=api.fleet.check_capacity)


async def _prepare(api: Api, request: Request, body: CountRequest) -> ChatGeneration:
    generation = await prepare(api, request, body.chat(api.config), RequestRecord.of(request.scope))
    generation.id = generation.id.replace("chatcmpl-", "msg_")
    if body.thinking and body.thinking.budget_tokens and reasoning_parser(generation.llm):
        budget = body.thinking.budget_tokens
        generation.params = msgspec.structs.replace(generation.params, thinking_token_budget=budget)
    return generation
