"""POST /api/embed, and the older /api/embeddings, which takes one prompt and does not normalize its embedding."""

import time
from functools import partial
from typing import Any, TypedDict

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.async_llm import AsyncLLM
from octavo.frontend.requests import MAX_TRUNCATED, encode
from octavo.params import PoolingParams
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.errors import ApiError
from octavo.server.openai.embeddings import Embedded, embed, vectors_reply
from octavo.server.openai.pooled_requests import MAX_INPUTS
from octavo.server.openai.protocol import tenant_of
from octavo.server.openai.replies import Json
from octavo.server.openapi.operation import MODEL, Operation
from octavo.server.translation import parse
from octavo.text.offload import off_loop

from .models import known_name


class EmbedBody(BaseModel):
    """The body of /api/embed. `truncate`: whether the end of an input that is too long is left out (the default)."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    model: str
    input: str | list[str] = []
    truncate: bool | None = None
    dimensions: int | None = None


class EmbeddingsBody(BaseModel):
    """The body of /api/embeddings."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    model: str
    prompt: str = ""


class Embeddings(TypedDict):
    """The answer of /api/embed. Durations are in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OneEmbedding(TypedDict):
    """The answer of /api/embeddings."""

    embedding: list[float]


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    texts = Operation(
        tag="Ollama",
        summary="Embed texts.",
        body=EmbedBody,
        example={"model": MODEL, "input": ["A cat.", "A dog."]},
        reply=Embeddings,
    )
    text = Operation(
        tag="Ollama",
        summary="Embed one text, without normalizing.",
        body=EmbeddingsBody,
        example={"model": MODEL, "prompt": "A cat."},
        reply=OneEmbedding,
    )
    return [
        route("POST", "/api/embed", partial(embed_inputs, api), texts),
        route("POST", "/api/embeddings", partial(embed_prompt, api), text),
    ]


async def embed_inputs(api: Api, request: Request) -> Response:
    """Answer with the embedding of each input; without inputs, load the model. Raises ApiError, OctavoError."""
    began = time.perf_counter()
    body = parse(EmbedBody, await api.bodies.read_json(request, admit=api.fleet.check_capacity))
    texts = [body.input] if isinstance(body.input, str) else body.input
    params = PoolingParams(dimensions=body.dimensions)
    embedded, loaded = await _embed(api, request, body.model, texts, params, body.truncate is not False)
    rest = {
        "model": body.model,
        "total_duration": int((time.perf_counter() - began) * 1e9),
        "load_duration": int((loaded - began) * 1e9),
        "prompt_eval_count": embedded.num_tokens,
    }
    return await vectors_reply("embeddings", embedded, lambda _, vector: vector.tolist(), rest)


async def embed_prompt(api: Api, request: Request) -> Response:
    """Answer with the embedding of one prompt. Raises ApiError, OctavoError."""
    body = parse(EmbeddingsBody, await api.bodies.read_json(request, admit=api.fleet.check_capacity))
    params = PoolingParams(normalize=False)
    embedded, _ = await _embed(api, request, body.model, [body.prompt], params, truncate=True)
    return Json({"embedding": embedded.vector(0).tolist() if embedded.outputs else []})


async def _embed(
    api: Api, request: Request, name: str, texts: list[str], params: PoolingParams, truncate: bool
) -> tuple[Embedded, float]:
    """Return the embeddings of texts, and the time.perf_counter() at which the model was loaded."""
    if len(texts) > MAX_INPUTS:
        raise ApiError(400, f"input has {len(texts)} entries; the limit is {MAX_INPUTS}", "input")
    record = RequestRecord.of(request.scope)
    terms: dict[str, Any] = {"tenant": tenant_of(request.headers, None)}
    llm = await api.model(record, known_name(api, name), None, terms)
    loaded = time.perf_counter()
    llm.check_capacity(len(texts))
    if not any(texts):
        return Embedded(llm, [], params), loaded
    tokens = await off_loop(
        llm.tokenizer, sum(map(len, texts)), lambda: [_tokens(llm, text, truncate) for text in texts]
    )
    return await embed(llm, tokens, params, terms, record), loaded


def _tokens(llm: AsyncLLM, text: str, truncate: bool) -> list[int]:
    """Return the token ids of a text; with `truncate`, the first ones that fit into the context."""
    limit = llm.info.max_model_len - 1
    kept = MAX_TRUNCATED * llm.info.max_model_len if truncate else None
    return encode(text, llm.tokenizer, llm.info, kept, add_special_tokens=True)[:limit]
