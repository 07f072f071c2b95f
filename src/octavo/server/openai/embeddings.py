"""POST /v1/embeddings."""

import asyncio
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.async_llm import AsyncLLM
from octavo.errors import InvalidRequest
from octavo.frontend.pooled import embedding_of, embedding_requests
from octavo.outputs import RequestOutput
from octavo.params import PoolingParams, SamplingParams
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.edge.spending import spending
from octavo.server.openapi.operation import MODEL, Operation

from .generation import tokenized
from .pooled_requests import EmbeddingRequest
from .replies import encode

MAX_TOKENS = 1_000_000  # of all inputs of a request
MAX_VALUES = 1 << 22  # of all embeddings of a request: 16 MiB, and some 90 MB as JSON
VALUES_AT_ONCE = 8192  # converted in about a millisecond


class Embedding(msgspec.Struct, kw_only=True):
    """One embedding: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingListEnd(msgspec.Struct, kw_only=True):
    """The fields of an answer besides `data`."""

    object: Literal["list"] = "list"
    model: str
    usage: EmbeddingUsage


class EmbeddingList(EmbeddingListEnd, kw_only=True):
    """A whole answer."""

    data: list[Embedding]


@dataclass(frozen=True)
class Embedded:
    """Computed embeddings: the outputs of pooled requests, and how they become embeddings."""

    llm: AsyncLLM
    outputs: list[RequestOutput]
    params: PoolingParams

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all inputs."""
        return sum(len(output.prompt_token_ids) for output in self.outputs)

    def vector(self, i: int) -> np.ndarray:
        """Return an embedding, float32 [dimensions]."""
        return embedding_of(self.outputs[i], self.params)


def routes(api: Api) -> list[Route]:
    """Return the route of this family."""
    example = {"model": MODEL, "input": ["A cat.", "A dog."]}
    described = Operation(
        tag="OpenAI", summary="Embed texts.", body=EmbeddingRequest, example=example, reply=EmbeddingList
    )
    return [route("POST", "/v1/embeddings", partial(embeddings, api), described)]


async def embeddings(api: Api, request: Request) -> Response:
    """Answer with the embeddings of inputs. Raises ApiError, OctavoError."""
    record = RequestRecord.of(request.scope)
    body = EmbeddingRequest.from_json(await api.bodies.read_json(request, admit=api.fleet.check_capacity))
    terms, params = body.terms(request.headers), body.pooling_params()
    llm = await api.model(record, body.model, body.user_id, terms)
    llm.check_capacity(len(body.input))
    if api.config.access_log_prompts:
        record.prompt = body.input
    kept = SamplingParams(max_tokens=0, truncate_prompt_tokens=params.truncate_prompt_tokens)
    prompts = await tokenized(llm, body.input, body.add_special_tokens is not False, kept)
    embedded = await embed(llm, prompts, params, terms, record)
    return await _reply(embedded, is_base64=body.encoding_format == "base64")


async def embed(
    llm: AsyncLLM, prompts: list[list[int]], params: PoolingParams, terms: dict[str, Any], record: RequestRecord
) -> Embedded:
    """Compute embeddings of token ids, and count the tokens in `record`. Raises InvalidRequest, OctavoError.

    Args:
        terms: the given fields of ServiceTerms.
    """
    if (count := sum(map(len, prompts))) > MAX_TOKENS:
        raise InvalidRequest(f"the inputs have {count:,} tokens together; the limit is {MAX_TOKENS:,}", "input")
    if (count := len(prompts) * (params.dimensions or llm.info.hidden_size)) > MAX_VALUES:
        message = (
            f"the embeddings would have {count:,} numbers together; the limit is {MAX_VALUES:,}: send fewer inputs"
        )
        raise InvalidRequest(message, "input")
    terms = dict(terms)
    record.model, record.tenant = llm.config.model_name, terms["tenant"]
    priority = terms.pop("priority", 0)
    async with spending(record, llm, terms, sum(map(len, prompts))) as tally:
        requests = embedding_requests(prompts, params, llm.info, priority, terms)  # type: ignore[arg-type]
        embedded = Embedded(llm, await llm.generate_requests(requests, tally=tally), params)
    record.prompt_tokens, record.completion_tokens = embedded.num_tokens, 0
    record.cached_tokens = sum(output.num_cached_tokens for output in embedded.outputs)
    record.replica = embedded.outputs[0].metrics.replica
    return embedded


async def _reply(embedded: Embedded, is_base64: bool) -> Response:
    def item(i: int, vector: np.ndarray) -> Embedding:
        value = b64encode(vector.astype("<f4").tobytes()).decode() if is_base64 else vector.tolist()
        return Embedding(index=i, embedding=value)

    usage = EmbeddingUsage(embedded.num_tokens, embedded.num_tokens)
    return await vectors_reply(
        "data", embedded, item, EmbeddingListEnd(model=embedded.llm.config.model_name, usage=usage)
    )


async def vectors_reply(
    name: str, embedded: Embedded, item: Callable[[int, np.ndarray], object], rest: object
) -> Response:
    """Return an object with an array `name` and the fields of `rest`.

    Vectors are converted in short turns of the event loop.

    Args:
        item: returns the element of the array for the vector of input number i.
    """
    items, values = [], 0
    for i in range(len(embedded.outputs)):
        vector = embedded.vector(i)
        items.append(encode(item(i, vector)))
        if (values := values + len(vector)) >= VALUES_AT_ONCE:
            values = 0
            await asyncio.sleep(0)
    head, end = b"{" + encode(name) + b":[", b"]," + encode(rest)[1:]
    body = await asyncio.to_thread(lambda: b"".join((head, b",".join(items), end)))
    return Response(body, media_type="application/json")
