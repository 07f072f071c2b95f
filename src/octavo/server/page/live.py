"""GET /stats/live: statistics, latencies, tenants and the states of all KV pages, as events, for the live view.

Everything is computed for these events alone. Requests are measured from the first look on, until the server ends.
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

from octavo.errors import OctavoError
from octavo.frontend.meter import FIRST_TOKEN, HISTOGRAMS, INTER_TOKEN, Meter, TenantCounts
from octavo.server.api import Api
from octavo.server.edge.dispatch import route
from octavo.server.openai.replies import encode
from octavo.server.openapi.operation import Operation
from octavo.server.stats import ModelStats, model_stats
from octavo.version import __version__

from .shared import Shared

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
    return [route("GET", PATH, partial(live, Source(api)), operation)]


async def live(source: "Source", request: Request) -> Response:
    """Answer with events. Raises UnknownModel."""
    model, follow = request.query_params.get("model"), request.query_params.get("follow") == "true"
    model = source.known(model)
    return LiveEvents(source, model, follow, "gzip" in request.headers.get("accept-encoding", ""))


class Source:
    """Encodes the events, once for all clients that follow them."""

    def __init__(self, api: Api):
        self._fleet, self.is_ending = api.fleet, api.draining
        self.stats = Shared(self._stats, STATS_PERIOD / 2)
        self._pages: dict[str, Shared[dict[str, bytes]]] = {}

    def begin(self) -> bytes:
        """Return the first event. From now on, requests are measured."""
        if self._fleet.meters is None:
            self._fleet.enable_metrics()
        return _event(Begin(__version__, BOUNDS))

    def known(self, model: str | None) -> str:
        """Return the name of a model; None is the default model. Raises UnknownModel."""
        return self._fleet.known(model or self._fleet.default.name).name

    async def pages(self, model: str) -> dict[str, bytes]:
        """Return an event for each engine of a model that answers, by its name."""
        if model not in self._pages:
            self._pages[model] = Shared(partial(self._read_pages, model), PAGES_PERIOD / 2)
        return await self._pages[model].get()

    async def _read_pages(self, name: str) -> dict[str, bytes]:
        model = self._fleet.known(name)
        if not model.was_loaded:
            return {}
        states = await model.llm.page_states()
        return {each: _event(LivePages(name, each, base64.b64encode(states[each]).decode())) for each in states}

    async def _stats(self) -> bytes:
        stats = await asyncio.gather(*map(model_stats, self._fleet.all_models()))
        meters = self._fleet.meters or {}
        return _event(Live(time.time(), [_model(each, meters.get(each.name)) for each in stats]))


class LiveEvents(Response):
    """The events.

    Args:
        model: the model whose pages are sent.
        follow: whether further events follow, until the server drains.
        compress: whether the client takes gzip.
    """

    media_type = "text/event-stream"

    def __init__(self, source: Source, model: str, follow: bool, compress: bool):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", "vary": "accept-encoding"}
        super().__init__(headers=headers | ({"content-encoding": "gzip"} if compress else {}))
        del self.headers["content-length"]
        self._source, self._model, self._follow = source, model, follow
        self._gzip = zlib.compressobj(1, wbits=31) if compress else None
        self._sent: dict[str, bytes] = {}  # the latest pages by engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if scope["method"] == "GET":
            with contextlib.suppress(OctavoError, asyncio.CancelledError):  # the server ends, or the client has gone
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
        clock, source = asyncio.get_running_loop().time, self._source
        yield source.begin()
        next_stats = clock()
        while not source.is_ending():
            began = clock()
            if began >= next_stats:
                next_stats = began + STATS_PERIOD
                yield await source.stats.get()
            pages = await source.pages(self._model)
            if changed := [event for engine, event in pages.items() if self._sent.get(engine) != event]:
                self._sent = pages
                yield b"".join(changed)
            if not self._follow:
                return
            await asyncio.sleep(max(0.0, began + PAGES_PERIOD - clock()))


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
