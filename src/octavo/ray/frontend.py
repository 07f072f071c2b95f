"""Frontend: the HTTP server as a Ray Serve deployment. It uses engines that Ray starts and ends."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Mapping
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.config import EngineConfig
from octavo.fleet.fleet import Fleet
from octavo.fleet.model import Model
from octavo.fleet.specs import FleetSpec, ModelSpec
from octavo.server.app import create_app
from octavo.server.config import ServerConfig

from .cluster_secret import secret_source
from .engine import Work

LOOK = 0.5  # seconds between questions to Ray for the engines
PATIENCE = 5.0  # seconds for an engine to say its address

log = logging.getLogger("octavo")


class Frontend:
    """A replica of the ingress deployment.

    Args:
        settings: by the model's name, those of the EngineConfig that concern a frontend.
        server: settings of the ServerConfig.
        engines: the deployment of each model's engines, in the order of `settings`; the keywords' names do not matter.
    """

    def __init__(
        self,
        settings: Mapping[str, Mapping[str, Any]],
        server: Mapping[str, Any],
        **engines: DeploymentHandle[Any],
    ):
        handles = dict(zip(settings, engines.values(), strict=True))
        self._service = Service(settings, server, handles)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._service


class Service:
    """The ASGI application, whose life span begins when the engines of all models can be used."""

    def __init__(
        self,
        settings: Mapping[str, Mapping[str, Any]],
        server: Mapping[str, Any],
        engines: Mapping[str, DeploymentHandle[Any]],
    ):
        self._settings, self._engines = settings, engines
        self._server = ServerConfig(**server)
        self._id = uuid.uuid4().hex
        self._fleet: Fleet | None = None
        self._app: ASGIApp | None = None
        self._following: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            assert self._app is not None
            await self._app(scope, receive, send)
            return
        await receive()  # startup
        try:
            await self._start()
        except Exception as error:
            log.exception("the frontend cannot start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()  # shutdown
        await self._close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        found = await asyncio.gather(*(self._first(name) for name in self._engines))
        secret = secret_source()
        configs = [
            EngineConfig.from_keywords(**self._settings[name], engines=addresses, secret_file=secret)
            for name, addresses in zip(self._engines, found, strict=True)
        ]
        self._fleet = Fleet.begin(FleetSpec([ModelSpec(config=config) for config in configs]))
        await self._fleet.start()
        self._app = create_app(self._fleet, self._server)
        self._following = [asyncio.create_task(self._follow(model)) for model in self._fleet.models]

    async def _close(self) -> None:
        for task in self._following:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._fleet is not None:
            await self._fleet.close()

    async def _first(self, name: str) -> list[str]:
        """Wait for the first engines of a model."""
        await self._engines[name].wake.remote()
        while not (addresses := await self._meet(name, {})):
            await asyncio.sleep(LOOK)
        return addresses

    async def _follow(self, model: Model) -> None:
        """Use the engines that Ray has, and make it start one if there is none for a request."""
        handle, waking = self._engines[model.name], None
        known: list[str] = []
        while True:
            await asyncio.sleep(LOOK)
            try:
                addresses = await self._meet(model.name, _work(model))
            except Exception as error:  # Ray's controller may be restarting
                log.warning("Ray does not say which engines %s has: %s", model.name, error)
                continue
            if addresses and addresses != known and model.was_loaded:
                known = addresses
                model.llm.set_engines(addresses)
            if not addresses and not model.is_idle and waking is None:
                waking = asyncio.ensure_future(handle.wake.remote())
            if waking is not None and waking.done():
                waking = None

    async def _meet(self, name: str, work: Mapping[str, Work]) -> list[str]:
        """Tell all engines of a model what work there is for them. Returns the addresses of those that answer."""
        response = self._engines[name].broadcast("meet", self._id, work)
        try:
            answers = await response.results_async(timeout_s=PATIENCE, return_exceptions=True)
        except DeploymentUnavailableError:  # there is no engine now
            return []
        return sorted(answer for answer in answers if isinstance(answer, str))


def _work(model: Model) -> dict[str, Work]:
    """Return what this frontend has for each engine of a model, by address."""
    if not model.was_loaded:
        return {}
    return {
        address: Work(load.queued_tokens, load.queued_tokens * load.seconds_per_token, load.completions)
        for address, load in model.llm.engine_loads().items()
    }
