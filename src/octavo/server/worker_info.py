"""Routes that routers in front of several servers query: GET /server_info, /model_info and /get_load.

Such routers call the servers behind them workers. Routes and fields have the names that sglang-router and vllm-router
read, which are mostly those of SGLang (docs/routers.md).
"""

import uuid
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.async_llm import AsyncLLM
from octavo.errors import EngineDead
from octavo.version import __version__

from .api import Api
from .edge.dispatch import route
from .openai.replies import Json
from .openapi.operation import Operation


class ServerInfo(msgspec.Struct, kw_only=True):
    """The default model of this server and its limits.

    Attributes:
        model_id, served_model_name: the model's name in the API.
        model_path, tokenizer_path: the name by which the model was loaded.
        instance_id: differs between servers, and between two starts of one server.
        tp_size, dp_size: 1, since a router does not choose among the engines of one server.
        max_running_requests: maximum of sequences that run at the same time, in all engines.
        max_prefill_tokens: maximum of tokens that an engine computes in one step.
        max_total_num_tokens: capacity of the KV cache of all engines, in tokens.
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
    """The default model; see ServerInfo."""

    model_path: str
    served_model_name: str
    tokenizer_path: str
    is_generation: bool = True


class Load(msgspec.Struct, kw_only=True):
    """The work of the default model's engines together.

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
    described = Operation(tag="SGLang", summary="Describe the server and its limits.", reply=ServerInfo)
    of_model = Operation(tag="SGLang", summary="Describe the default model.", reply=ModelInfo)
    loads = Operation(tag="SGLang", summary="Return the load of the default model.", reply=list[Load])
    return [
        route("GET", "/server_info", info, described),
        route("GET", "/get_server_info", info, described),
        route("GET", "/model_info", model, of_model),
        route("GET", "/get_model_info", model, of_model),
        route("GET", "/get_load", partial(get_load, api), loads),
    ]


async def server_info(api: Api, instance_id: str, _: Request) -> Response:
    """Answer with ServerInfo, or 503 if the model has never been loaded."""
    llm = _loaded(api)
    config, info = llm.config, llm.info
    return Json(
        ServerInfo(
            model_id=config.model_name,
            served_model_name=config.model_name,
            model_path=config.model,
            tokenizer_path=config.model,
            instance_id=instance_id,
            max_running_requests=config.max_batch_size * config.data_parallel_size,
            max_prefill_tokens=config.max_batch_tokens,
            max_total_num_tokens=info.num_pages * info.page_size * config.data_parallel_size,
            context_length=info.max_model_len,
            kv_block_size=info.page_size,
        )
    )


async def model_info(api: Api, _: Request) -> Response:
    """Answer with ModelInfo."""
    config = api.fleet.default.config
    return Json(ModelInfo(model_path=config.model, served_model_name=config.model_name, tokenizer_path=config.model))


async def get_load(api: Api, _: Request) -> Response:
    """Answer with a list of one Load, or 503 if no engine reports within a second."""
    llm = _loaded(api)
    stats = await llm.stats()
    used_pages = stats.num_pages - stats.free_pages - stats.cached_pages
    load = Load(
        num_reqs=stats.running + stats.waiting,
        num_waiting_reqs=stats.waiting,
        num_tokens=used_pages * llm.info.page_size,
    )
    return Json([load])


def _loaded(api: Api) -> AsyncLLM:
    """Return the default model. Raises EngineDead unless it has been loaded."""
    if not (model := api.fleet.default).was_loaded:
        raise EngineDead(f"the model {model.name!r} is {model.state}")
    return model.llm
