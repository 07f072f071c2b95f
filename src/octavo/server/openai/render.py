"""POST /v1/completions/render and /v1/chat/completions/render: the token ids of prompts, without a completion.

vllm-router and the endpoint pickers of Kubernetes gateways send them the body of a request, to look up which server
has its prefix in the cache. Routes and fields are those of vLLM.
"""

from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.async_llm import AsyncLLM
from octavo.errors import InvalidRequest
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.openapi.operation import MODEL, Operation

from .chat_generation import chat_tokens, rendered
from .generation import infilled, tokenized
from .protocol import ChatRequest, CompletionRequest, GenerationRequest
from .replies import Json


class RenderedPrompt(msgspec.Struct, kw_only=True):
    """A prompt as the model would get it. `cache_salt` separates its pages in the prefix cache from those of others."""

    model: str
    token_ids: list[int]
    cache_salt: str | None = None


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    completion = Operation(
        tag="vLLM",
        summary="Return the token ids of a completion's prompts.",
        body=CompletionRequest,
        example={"model": MODEL, "prompt": "Hello"},
        reply=list[RenderedPrompt],
    )
    chat = Operation(
        tag="vLLM",
        summary="Return the token ids of a chat's prompt.",
        body=ChatRequest,
        example={"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]},
        reply=RenderedPrompt,
    )
    return [
        route("POST", "/v1/completions/render", partial(render_completion, api), completion),
        route("POST", "/v1/chat/completions/render", partial(render_chat, api), chat),
    ]


async def render_completion(api: Api, request: Request) -> Response:
    """Answer with a RenderedPrompt for each prompt of the body. Raises ApiError, OctavoError."""
    body = CompletionRequest.from_json(await _read(api, request), api.config)
    llm = await _model(api, request, body)
    prompts = (await infilled(llm, body))[0] if body.suffix else await tokenized(llm, body.prompt)
    return Json([_rendered(llm, body, prompt) for prompt in prompts])


async def render_chat(api: Api, request: Request) -> Response:
    """Answer with the RenderedPrompt of a chat. Raises ApiError, OctavoError."""
    body = ChatRequest.from_json(await _read(api, request), api.config)
    llm = await _model(api, request, body)
    text = await rendered(llm, body, body.conversation())
    prompt = await chat_tokens(llm, body, text, body.sampling_params(llm.generation_defaults))
    return Json(_rendered(llm, body, prompt))


async def _read(api: Api, request: Request) -> Any:
    return await api.bodies.read_json(request, admit=api.fleet.check_capacity)


async def _model(api: Api, request: Request, body: GenerationRequest) -> AsyncLLM:
    terms = body.terms(request.headers)
    llm = await api.model(RequestRecord.of(request.scope), body.model, body.user_id, terms)
    if isinstance(body.kv_cache_state, str):
        raise InvalidRequest("a request that continues a KV state cannot be rendered", "kv_cache_state")
    return llm


def _rendered(llm: AsyncLLM, body: GenerationRequest, prompt: list[int]) -> RenderedPrompt:
    return RenderedPrompt(model=llm.config.model_name, token_ids=prompt, cache_salt=body.cache_salt)
