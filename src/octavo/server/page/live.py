"""GET /stats/live: statistics, latencies, tenants and the states of all KV pages, as events, for the live view.

Everything is computed for these events alone: if nobody asks, nothing is measured or collected.
"""

import asyncio
import base64
import contextlib
import time
import zlib
from collections.abc import AsyncGenerator, Sequence
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from octavo.errors import EngineDead
from octavo.frontend.meter import FIRST_TOKEN, HISTOGRAMS, INTER_TOKEN, Meter, TenantCounts
from octavo.server.api import Api
from octavo.server.edge.dispatch import route
from octavo.server.openai.replies import encode
from octavo.server.openapi.operation import Operation
from octavo.server.stats import ModelStats, model_stats
from octavo.version import __version__

PATH = "/stats/live"
STATS_PERIOD, PAGES_PERIOD = 1.0, 0.1  # seconds between two events
FIRST, QUEUE, WHOLE = "first_token", "request_queue_time_seconds", "e2e_request_latency_seconds"
BOUNDS = {FIRST: FIRST_TOKEN, **{name: HISTOGRAMS[name] for name in (INTER_TOKEN, QUEUE, WHOLE)}}


class Begin(msgspec.Struct, tag="begin"):
    """The first event.

    Attributes:
        bounds: the upper bounds of the buckets of each latency, in seconds; a last bucket has all above.
    """

    version: str
    bounds: dict[str, Sequence[float]]


class TenantLive(msgspec.Struct):
    """Counts of one tenant, since the route was first used, or on a server with metrics since its start.

    Attributes:
        first_token: requests by the time to their first token, in buckets.
    """

    name: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    first_token: list[int]


class ModelLive(msgspec.Struct):
    """One model. `latencies` are requests, or tokens, in the buckets of Begin.bounds."""

    stats: ModelStats
    latencies: dict[str, list[int]]
    tenants: list[TenantLive]


class Live(msgspec.Struct, tag="stats"):
    """An event each STATS_PERIOD."""

    time: float
    models: list[ModelLive]


class LivePages(msgspec.Struct, tag="pages"):
    """An event when pages of an engine have changed, at most every PAGES_PERIOD.

    Attributes:
        pages: a byte for each page (octavo.kv.page_map.PageState), in base64.
    """

    model: str
    engine: str
    pages: str


def routes(api: Api) -> list[Route]:
    """Return the route."""
    operation = Operation(
        tag="Octavo",
        summary="Return events with statistics and the states of a model's KV pages; with follow, as a stream.",
        query={"model": str, "follow": bool},
        events=Begin | Live | LivePages,
    )
    return [route("GET", PATH, partial(live, api), operation)]


async def live(api: Api, request: Request) -> Response:
    """Answer with events. Raises UnknownModel."""
    model, follow = request.query_params.get("model"), request.query_params.get("follow") == "true"
    api.fleet.resolve(model)
    return LiveEvents(api, model, follow, "gzip" in request.headers.get("accept-encoding", ""))


class LiveEvents(Response):
    """The events.

    Args:
        model: the model whose pages are sent; None for the default model.
        follow: whether further events follow, until the server drains.
        compress: whether the client takes gzip.
    """

    media_type = "text/event-stream"

    def __init__(self, api: Api, model: str | None, follow: bool, compress: bool):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", "vary": "accept-encoding"}
        super().__init__(headers=headers | ({"content-encoding": "gzip"} if compress else {}))
        del self.headers["content-length"]
        self._api, self._model, self._follow = api, model, follow
        self._gzip = zlib.compressobj(1, wbits=31) if compress else None
        self._sent: dict[str, bytes] = {}  # by engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if scope["method"] == "GET":
            with contextlib.suppress(EngineDead, asyncio.CancelledError):  # the server ends, or the client has gone
                await self._send_events(send)
        end = self._gzip.flush() if self._gzip else b""
        await send({"type": "http.response.body", "body": end, "more_body": False})

    async def _send_events(self, send: Send) -> None:
        async with contextlib.aclosing(self._events()) as parts:
            async for part in parts:
                body = await asyncio.to_thread(self._compressed, part) if self._gzip else part
                await send({"type": "http.response.body", "body": body, "more_body": True})

    def _compressed(self, part: bytes) -> bytes:
        assert self._gzip is not None
        return self._gzip.compress(part) + self._gzip.flush(zlib.Z_SYNC_FLUSH)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        clock, fleet = asyncio.get_running_loop().time, self._api.fleet
        if fleet.meters is None:
            fleet.enable_metrics()
        yield _event(Begin(__version__, BOUNDS))
        next_stats = clock()
        while not self._api.draining():
            began = clock()
            if began >= next_stats:
                next_stats = began + STATS_PERIOD
                yield _event(await self._stats())
            if events := await self._changed_pages():
                yield events
            if not self._follow:
                return
            await asyncio.sleep(max(0.0, began + PAGES_PERIOD - clock()))

    async def _stats(self) -> Live:
        models = self._api.fleet.all_models()
        stats = await asyncio.gather(*map(model_stats, models))
        meters = self._api.fleet.meters or {}
        return Live(time.time(), [_model(each, meters.get(each.name)) for each in stats])

    async def _changed_pages(self) -> bytes:
        model = self._api.fleet.known(self._api.fleet.resolve(self._model))
        if not model.was_loaded:
            return b""
        events = []
        for engine, states in (await model.llm.page_states()).items():
            if self._sent.get(engine) != states:
                self._sent[engine] = states
                events.append(_event(LivePages(model.name, engine, base64.b64encode(states).decode())))
        return b"".join(events)


def _event(data: Begin | Live | LivePages) -> bytes:
    return b"data: %b\n\n" % encode(data)


def _model(stats: ModelStats, meter: Meter | None) -> ModelLive:
    engines = list(meter.engines.values()) if meter else []
    latencies = {name: _sum([each.histograms[name].counts for each in engines]) for name in BOUNDS if name != FIRST}
    names = dict.fromkeys(name for each in engines for name in each.tenants)
    tenants = [_tenant(name, [each.tenants[name] for each in engines if name in each.tenants]) for name in names]
    latencies[FIRST] = _sum([each.first_token for each in tenants])
    return ModelLive(stats, latencies, tenants)


def _tenant(name: str, counts: list[TenantCounts]) -> TenantLive:
    return TenantLive(
        name,
        requests=sum(each.requests for each in counts),
        prompt_tokens=sum(each.prompt_tokens for each in counts),
        cached_tokens=sum(each.cached_tokens for each in counts),
        generated_tokens=sum(each.generated_tokens for each in counts),
        first_token=_sum([each.first_token.counts for each in counts]),
    )


def _sum(counts: list[list[int]]) -> list[int]:
    return [sum(each) for each in zip(*counts, strict=True)]
