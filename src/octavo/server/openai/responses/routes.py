"""The routes of /v1/responses."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.errors import ApiError
from octavo.server.openai.protocol import TENANT_QUERY, tenant_of
from octavo.server.openai.replies import Json
from octavo.server.openapi.operation import MODEL, Operation

from .background import Background, unpack
from .body import ResponsesRequest
from .builder import ResponseBuilder
from .items import Item
from .objects import Deleted, InputTokens, ItemList, ResponseObject
from .prepare import Prepared, prepare
from .run import Run
from .store import ResponseStore, StoredResponse
from .stream import EventResponse

PATH = "/v1/responses"
MAX_PAGE = 100  # input items in one answer
DEFAULT_PAGE = 20
EVENT = {
    "type": "object",
    "properties": {"type": {"type": "string"}, "sequence_number": {"type": "integer"}},
    "required": ["type", "sequence_number"],
}
"""The schema of an event of a stream: those of OpenAI's API, with further fields for each type."""

STREAM_QUERY: dict[str, Any] = {
    "stream": Annotated[bool, Meta(description="Whether to return the events of its stream again.")],
    "starting_after": Annotated[int, Meta(description="The sequence number of the last event to leave out.")],
    **TENANT_QUERY,
}
PAGE_QUERY: dict[str, Any] = {
    "limit": Annotated[int, Meta(ge=1, le=MAX_PAGE, description="Maximum number of entries.")],
    "after": Annotated[str, Meta(description="The id of the last entry of the page before.")],
    "order": Literal["asc", "desc"],
    **TENANT_QUERY,
}


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    responses = Responses(api, ResponseStore(api.database))

    def described(summary: str, **more: Any) -> Operation:
        return Operation(tag="OpenAI", summary=summary, **{"reply": ResponseObject, "query": TENANT_QUERY, **more})

    example = {"model": MODEL, "input": "Say hello.", "max_output_tokens": 8}
    body: Any = {"body": ResponsesRequest, "example": example, "query": {}}
    created = described("Create a response.", **body, events=EVENT)
    counted = described("Count the tokens of a request.", **body, reply=InputTokens)
    retrieved = described("Return a stored response.", query=STREAM_QUERY, events=EVENT)
    deleted = described("Delete a stored response.", reply=Deleted)
    cancelled = described("Cancel a response in the background.")
    items = described("List the items before a response.", query=PAGE_QUERY, reply=ItemList)
    return [
        route("POST", PATH, responses.create, created),
        route("POST", f"{PATH}/input_tokens", responses.count_input_tokens, counted),
        route("GET", f"{PATH}/{{id}}", responses.retrieve, retrieved),
        route("DELETE", f"{PATH}/{{id}}", responses.delete, deleted),
        route("POST", f"{PATH}/{{id}}/cancel", responses.cancel, cancelled),
        route("GET", f"{PATH}/{{id}}/input_items", responses.list_input_items, items),
    ]


@dataclass
class Responses:
    """The handlers of the routes. They raise ApiError and OctavoError.

    Args:
        running: the background responses that have not ended, by id.
    """

    api: Api
    store: ResponseStore
    running: dict[str, Background] = field(default_factory=dict)

    async def create(self, request: Request) -> Response:
        """Answer POST /v1/responses."""
        prepared = await prepare(self.api, self.store, request, RequestRecord.of(request.scope))
        body = prepared.body
        builder = ResponseBuilder(prepared.response(), body.summarizes, encoded=bool(body.stream or body.background))
        run = Run(prepared.generation, builder, prepared.tenant, prepared.input, self.store.put)
        if body.background:
            return await self._start(run, prepared, request)
        if body.stream:
            return EventResponse(run.events(), run.fail)
        return Json(await run.whole())

    async def _start(self, run: Run, prepared: Prepared, request: Request) -> Response:
        """Start a background response, which outlives the request, and answer with it or with its stream."""
        id, record = run.response.id, RequestRecord.of(request.scope)
        release_model, record.on_end = record.on_end, None

        def release() -> None:
            del self.running[id]
            if release_model is not None:
                release_model()
            if record.evidence is not None:
                record.evidence.end()

        if record.evidence is not None:
            record.evidence.is_deferred = True
        background = Background(run, release, keep_events=bool(prepared.body.stream))
        self.running[id] = background
        reply = Json(run.response)  # while its status is queued
        await background.start(request.scope.get("octavo.tasks", set()))
        return EventResponse(background.follow(after=-1), lambda _: b"") if prepared.body.stream else reply

    async def count_input_tokens(self, request: Request) -> Response:
        """Answer POST /v1/responses/input_tokens."""
        prepared = await prepare(self.api, self.store, request, RequestRecord.of(request.scope))
        return Json(InputTokens(input_tokens=len(prepared.generation.prompts[0])))

    async def retrieve(self, request: Request) -> Response:
        """Answer GET /v1/responses/{id}. With stream=true, replay the stream of a background response."""
        stored = await self._find(request)
        query = request.query_params
        if query.get("stream", "false").lower() not in ("true", "1"):
            return Json(stored.response)
        after = query.get("starting_after", "-1")
        if not after.removeprefix("-").isdecimal() or len(after) > 9:
            raise ApiError(400, "starting_after should be a sequence number", "starting_after")
        if (background := self.running.get(stored.id)) and background.keep_events:
            return EventResponse(background.follow(int(after)), lambda _: b"")
        if stored.events is None:
            message = "only a response that was created with background and stream can be streamed again"
            raise ApiError(400, message, "stream")
        return EventResponse(_replay(stored.events, int(after)), lambda _: b"")

    async def delete(self, request: Request) -> Response:
        """Answer DELETE /v1/responses/{id}. A response that is being generated is cancelled."""
        stored = await self._find(request)
        if background := self.running.get(stored.id):
            await background.cancel()
        await self.store.delete(stored.id, stored.tenant)
        return Json(Deleted(id=stored.id))

    async def cancel(self, request: Request) -> Response:
        """Answer POST /v1/responses/{id}/cancel. A response that has ended stays as it is."""
        stored = await self._find(request)
        if not stored.response["background"]:
            raise ApiError(400, "only a response that was created with background can be cancelled", "id")
        if background := self.running.get(stored.id):
            await background.cancel()
            return Json(background.run.response)
        return Json(stored.response)

    async def list_input_items(self, request: Request) -> Response:
        """Answer GET /v1/responses/{id}/input_items: the conversation before the response, page by page."""
        stored = await self._find(request)
        items = list(stored.input)
        if stored.previous is not None:
            turns = await self.store.conversation(stored.previous, stored.tenant)
            items = [item for turn in turns for item in turn.items] + items
        return Json(_page(items, request.query_params))

    async def _find(self, request: Request) -> StoredResponse:
        """Return the response that a request names, as it is now. Raises ApiError 404."""
        tenant, id = tenant_of(request.headers, request.query_params.get("tenant")), request.path_params["id"]
        background = self.running.get(id)
        if background is not None and background.run.tenant == tenant:
            return background.run.stored()
        if (stored := await self.store.find(id, tenant)) is None:
            raise ApiError(404, f"the response {id[:100]!r} does not exist, or was deleted", "id", "response_not_found")
        return stored


async def _replay(packed: bytes, after: int) -> AsyncGenerator[bytes, None]:
    yield b"".join(unpack(packed)[after + 1 :])


def _page(items: Sequence[Item], query: Mapping[str, str]) -> ItemList:
    """Return the page of `items` that the parameters limit, order and after select. Raises ApiError 400."""
    order, limit, after = query.get("order", "desc"), query.get("limit", str(DEFAULT_PAGE)), query.get("after")
    if order not in ("asc", "desc"):
        raise ApiError(400, "order should be asc or desc", "order")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= MAX_PAGE):
        raise ApiError(400, f"limit should be a number from 1 to {MAX_PAGE}", "limit")
    ordered = list(items) if order == "asc" else list(items)[::-1]
    start = 0
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise ApiError(404, "after names no input item of this response", "after")
        start = ids.index(after) + 1
    page = ordered[start : start + int(limit)]
    return ItemList(
        data=page,
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=start + len(page) < len(ordered),
    )
