"""Routes that routers in front of several servers query: GET /server_info, /model_info and /get_load.

Such routers call the servers behind them workers. Routes and fields have the names that sglang-router and vllm-router
read, which are mostly those of SGLang (docs/routers.md).
"""

import asyncio
import uuid
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.errors import EngineDead
from octavo.version import __version__

from .api import Api
from .edge.dispatch import route
from .errors import ApiError
from .openai.replies import Json

LOAD_SECONDS = 1.0  # time limit for an engine to report its load


class ServerInfo(msgspec.Struct, kw_only=True):
    """The model and the limits of this server.

    Attributes:
        model_id, served_model_name: the model's name in the API.
        model_path, tokenizer_path: the name by which the model was loaded.
        instance_id: differs between servers, and between two starts of one server.
        tp_size, dp_size: 1, since a router does not choose among the engines of one server.
        max_running_requests: maximum of sequences that run at the same time.
        max_prefill_tokens: maximum of tokens computed in one step.
        max_total_num_tokens: capacity of the KV cache, in tokens.
        context_length: maximum of tokens of prompt and output together.
        kv_block_size: tokens in a page of the KV cache.
    """

    model_id: str
    served_model_name: str
    model_path: str
    tokenizer_path: str
    instance_id: str
    version: str = __version__
    tp_size: int = 1
    dp_size: int = 1
    max_running_requests: int
    max_prefill_tokens: int
    max_total_num_tokens: int
    context_length: int
    kv_block_size: int


class ModelInfo(msgspec.Struct, kw_only=True):
    """The served model; see ServerInfo."""

    model_path: str
    served_model_name: str
    tokenizer_path: str
    is_generation: bool = True


class Load(msgspec.Struct, kw_only=True):
    """The work of one engine.

    Attributes:
        dp_rank: always 0; see ServerInfo.dp_size.
        num_reqs: sequences that run or wait.
        num_waiting_reqs: sequences that wait.
        num_tokens: tokens in the pages of the KV cache that sequences use. Every page counts as full.
    """

    dp_rank: int = 0
    num_reqs: int
    num_waiting_reqs: int
    num_tokens: int


def routes(api: Api) -> list[Route]:
    """Return the routes of this family. The paths with get_ are the older spelling of the same routes."""
    info, model = partial(server_info, api, uuid.uuid4().hex), partial(model_info, api)
    return [
        route("GET", "/server_info", info),
        route("GET", "/get_server_info", info),
        route("GET", "/model_info", model),
        route("GET", "/get_model_info", model),
        route("GET", "/get_load", partial(get_load, api)),
    ]


async def server_info(api: Api, instance_id: str, _: Request) -> Response:
    """Answer with ServerInfo."""
    config, info = api.llm.config, api.llm.info
    return Json(
        ServerInfo(
            model_id=config.model_name,
            served_model_name=config.model_name,
            model_path=config.model,
            tokenizer_path=config.model,
            instance_id=instance_id,
            max_running_requests=config.max_batch_size,
            max_prefill_tokens=config.max_batch_tokens,
            max_total_num_tokens=info.num_pages * info.page_size,
            context_length=info.max_model_len,
            kv_block_size=info.page_size,
        )
    )


async def model_info(api: Api, _: Request) -> Response:
    """Answer with ModelInfo."""
    config = api.llm.config
    return Json(ModelInfo(model_path=config.model, served_model_name=config.model_name, tokenizer_path=config.model))


async def get_load(api: Api, _: Request) -> Response:
    """Answer with a list of one Load, or 503 if the engine does not report within a second."""
    try:
        async with asyncio.timeout(LOAD_SECONDS):
            stats = await api.llm.stats()
    except TimeoutError:
        raise ApiError(503, "the engine does not respond", code="engine_unresponsive") from None
    except EngineDead as error:
        raise ApiError(503, str(error), code="engine_dead") from None
    used_pages = stats.num_pages - stats.free_pages - stats.cached_pages
    load = Load(
        num_reqs=stats.running + stats.waiting,
        num_waiting_reqs=stats.waiting,
        num_tokens=used_pages * api.llm.info.page_size,
    )
    return Json([load])
