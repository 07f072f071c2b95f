"""POST /score and /rerank: how relevant documents are for queries, judged by a generative model (frontend/scoring.py).

Routes and fields are those of vLLM; /rerank is Jina's and Cohere's as well.
"""

import asyncio
import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.async_llm import AsyncLLM
from octavo.frontend.scoring import ScoringParams, pairs_of, score_requests, scoring_output, share_prefix
from octavo.outputs import ScoringRequestOutput
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.edge.spending import spending
from octavo.server.errors import ApiError
from octavo.server.openapi.operation import MODEL, Operation

from .pooled_requests import MAX_INPUTS, JudgedRequest, RerankRequest, ScoreRequest
from .replies import Json, PromptTokensDetails, Usage


class Score(msgspec.Struct, kw_only=True):
    index: int
    object: Literal["score"] = "score"
    score: float


class Scores(msgspec.Struct, kw_only=True):
    """The answer of /score: a score from 0 to 1 for each pair, in order."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage


class Document(msgspec.Struct):
    text: str


class Ranked(msgspec.Struct, kw_only=True):
    """A document. `index` is its place in the request."""

    index: int
    document: Document | msgspec.UnsetType = msgspec.UNSET
    relevance_score: float


class Ranking(msgspec.Struct, kw_only=True):
    """The answer of /rerank: the documents, the most relevant one first."""

    id: str
    model: str
    usage: Usage
    results: list[Ranked]


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    texts = {"model": MODEL, "documents": ["Paris is in France.", "Cats sleep."]}
    scored = Operation(
        tag="vLLM",
        summary="Score how well documents answer queries.",
        body=ScoreRequest,
        example=texts | {"queries": "Where is Paris?"},
        reply=Scores,
    )
    ranked = Operation(
        tag="vLLM",
        summary="Rank documents by how well they answer a query.",
        body=RerankRequest,
        example=texts | {"query": "Where is Paris?"},
        reply=Ranking,
    )
    return [
        *(route("POST", path, partial(score, api), scored) for path in ("/score", "/v1/score")),
        *(route("POST", path, partial(rerank, api), ranked) for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
    ]


async def score(api: Api, request: Request) -> Response:
    """Answer with the scores of pairs. Raises ApiError, OctavoError."""
    body = ScoreRequest.from_json(await api.bodies.read_json(request, admit=api.fleet.check_capacity))
    llm, outputs = await _judge(api, request, body, *body.data())
    data = [Score(index=i, score=output.outputs.score) for i, output in enumerate(outputs)]
    created, model = int(time.time()), llm.config.model_name
    return Json(Scores(id=_id("score"), created=created, model=model, data=data, usage=_usage(outputs)))


async def rerank(api: Api, request: Request) -> Response:
    """Answer with documents by relevance. Raises ApiError, OctavoError."""
    body = RerankRequest.from_json(await api.bodies.read_json(request, admit=api.fleet.check_capacity))
    if body.top_n is not None and body.top_n < 0:
        raise ApiError(400, "top_n must be at least 0", "top_n")
    llm, outputs = await _judge(api, request, body, [body.query], body.documents)
    order = sorted(range(len(outputs)), key=lambda i: -outputs[i].outputs.score)  # stable: ties in the order given
    results = [
        Ranked(
            index=i,
            document=msgspec.UNSET if body.return_documents is False else Document(body.documents[i]),
            relevance_score=outputs[i].outputs.score,
        )
        for i in order[: body.top_n or None]
    ]
    return Json(Ranking(id=_id("rerank"), model=llm.config.model_name, usage=_usage(outputs), results=results))


async def _judge(
    api: Api, request: Request, body: JudgedRequest, queries: list[str], documents: list[str]
) -> tuple[AsyncLLM, list[ScoringRequestOutput]]:
    """Return the model, and the scores of all pairs."""
    record = RequestRecord.of(request.scope)
    terms: dict[str, Any] = body.terms(request.headers)
    scoring, pairs = body.scoring_params(), pairs_of(queries, documents)
    if len(pairs) > MAX_INPUTS:
        raise ApiError(400, f"there are {len(pairs)} pairs; the limit is {MAX_INPUTS}", "documents")
    llm = await api.model(record, body.model, body.user_id, terms)
    llm.check_capacity(len(pairs))
    record.model, record.tenant = llm.config.model_name, terms["tenant"]
    if api.config.access_log_prompts:
        record.prompt = pairs
    outputs = await _scored(llm, record, pairs, scoring, terms)
    usage = _usage(outputs)
    record.prompt_tokens, record.completion_tokens = usage.prompt_tokens, 0
    record.cached_tokens = usage.prompt_tokens_details.cached_tokens
    return llm, outputs


async def _scored(
    llm: AsyncLLM,
    record: RequestRecord,
    pairs: list[tuple[str, str]],
    scoring: ScoringParams,
    terms: dict[str, Any],
) -> list[ScoringRequestOutput]:
    """Return the scores of pairs; see AsyncLLM.score."""
    priority = terms.pop("priority", 0)
    given: Any = terms
    wanted = await asyncio.to_thread(score_requests, pairs, scoring, llm.tokenizer, llm.info, priority, given)
    async with spending(record, llm, terms, sum(len(request.prompt) for request in wanted)) as tally:
        answered = llm.generate_in_turn if share_prefix(pairs) else llm.generate_requests
        return [scoring_output(output) for output in await answered(wanted, tally=tally)]


def _usage(outputs: Sequence[ScoringRequestOutput]) -> Usage:
    count = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return Usage(count, 0, count, PromptTokensDetails(cached))


def _id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
