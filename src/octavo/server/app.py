"""The routes."""

import time

from fastapi import FastAPI, Request
from starlette.responses import Response

from octavo.async_llm import AsyncLLM
from octavo.version import __version__

from . import errors
from .openai.chat import chat_completions
from .openai.completions import completions
from .openai.generation import check_model
from .openai.kv_states import describe, find_state
from .openai.protocol import tenant_of
from .openai.replies import Json, ModelCard, ModelList
from .stats import server_stats


def create_app(llm: AsyncLLM) -> FastAPI:
    """The API of `llm`, which has been started.

    Bodies are read and replies encoded by us, not by FastAPI: see body.py and replies.py for why.
    """
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    errors.install(app)
    card = ModelCard(id=llm.config.model_name, created=int(time.time()), max_model_len=llm.info.max_model_len)

    @app.post("/v1/completions")
    async def post_completions(request: Request) -> Response:
        return await completions(llm, request)

    @app.post("/v1/chat/completions")
    async def post_chat_completions(request: Request) -> Response:
        return await chat_completions(llm, request)

    @app.get("/v1/models")
    async def get_models() -> Response:
        return Json(ModelList(data=[card]))

    @app.get("/v1/models/{name:path}")  # names of hub models have a slash
    async def get_model(name: str) -> Response:
        check_model(llm, name)
        return Json(card)

    @app.get("/v1/kv_cache_states/{id}")
    async def get_kv_cache_state(id: str, request: Request) -> Response:
        return Json(describe(find_state(llm, id, tenant_of(request.headers, request.query_params.get("tenant")))))

    @app.delete("/v1/kv_cache_states/{id}")
    async def delete_kv_cache_state(id: str, request: Request) -> Response:
        find_state(llm, id, tenant_of(request.headers, request.query_params.get("tenant"))).drop()
        return Response(status_code=204)

    @app.get("/health")
    async def get_health() -> Response:
        return Response(status_code=200)

    @app.get("/stats")
    async def get_stats() -> Response:
        return Json(await server_stats(llm))

    @app.get("/version")
    async def get_version() -> Response:
        return Json({"version": __version__})

    return app
