"""Dispatch requests to their routes, and convert exceptions to responses."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Receive, Scope, Send

from octavo.server.errors import ServerStopping, error_reply, error_response, is_expected
from octavo.server.openapi.operation import Operation

from . import cors
from .access_log import PROBES, RequestRecord
from .hosts import HostCheck
from .traffic import INTERNAL, Traffic

if TYPE_CHECKING:
    from .authentication import Authentication

Handler = Callable[[Request], Awaitable[Response]]

log = logging.getLogger("octavo.server")


class Endpoint:
    """A handler as an ASGI application, without Starlette's error handling: `Dispatcher` handles all errors."""

    def __init__(self, path: str, handler: Handler, operation: Operation):
        self.path, self._handler = path, handler
        self.operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handler(Request(scope, receive))
        await response(scope, receive, send)


def route(method: str, path: str, handler: Handler, operation: Operation) -> Route:
    """Return a route, which `operation` describes in /openapi.json. A route for GET answers HEAD too."""
    return Route(path, Endpoint(path, handler, operation), methods=[method])


class Dispatcher:
    """The ASGI application: finds the route, answers OPTIONS, and turns exceptions into responses.

    Args:
        origins: the web origins whose pages may call; see `cors`.
        traffic: counts the requests of clients.
        authentication: checks the API keys of clients; None if there are no keys.
        hosts: checks the names under which clients call the server; None if it has any.
        on_end: called with the path of each request's route, None if it has none, and its record.
    """

    def __init__(
        self,
        routes: Collection[BaseRoute],
        origins: Collection[str],
        traffic: Traffic | None = None,
        authentication: "Authentication | None" = None,
        hosts: HostCheck | None = None,
        on_end: Callable[[str | None, RequestRecord], None] | None = None,
    ):
        self._router = Router(list(routes), redirect_slashes=False)
        self._origins = origins
        self._traffic = traffic or Traffic()
        self._authentication, self._hosts = authentication, hosts
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # makes Starlette's router raise HTTPException instead of answering in plain text
        record = RequestRecord.of(scope)
        record.response_headers += cors.response_headers(scope["headers"], self._origins)
        is_client = INTERNAL not in scope
        counted = False
        try:
            if self._hosts and is_client and scope["path"] not in PROBES:
                self._hosts.check(scope["headers"])
            if scope["method"] == "OPTIONS":
                record.response_headers += cors.preflight_headers(scope["headers"], self._origins)
                await Response(status_code=204)(scope, receive, send)
            else:
                if self._authentication and is_client:
                    await self._authentication.enter(scope, record)
                if counted := scope["method"] == "POST" and is_client:
                    self._traffic.add(1)
                await self._router(scope, receive, send)
        except asyncio.CancelledError:  # the drain timeout is over, or the client has disconnected
            await self._answer(ServerStopping(), record, scope, receive, send)
        except Exception as error:
            await self._answer(error, record, scope, receive, send)
        finally:
            if counted:
                self._traffic.add(-1)
            if record.use is not None:
                record.use.leave()
            if record.on_end is not None:
                record.on_end()
            if self._on_end is not None:
                endpoint = scope.get("endpoint")
                self._on_end(endpoint.path if isinstance(endpoint, Endpoint) else None, record)

    async def close(self) -> None:
        """Store what must survive. To be called when all requests have ended."""
        if self._authentication is not None:
            await self._authentication.limits.limiter.close()

    async def _answer(
        self, error: Exception, record: RequestRecord, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if isinstance(error, HTTPException):  # 404 or 405 from the router
            error.detail = f"{error.detail}: {scope['method']} {scope['path']}"
        elif not is_expected(error):
            log.error("a request failed", exc_info=error)
        note_error(record, error)
        await error_response(error, scope["path"])(scope, receive, send)


def note_error(record: RequestRecord, error: Exception) -> None:
    """Store the code of an error, or its type if it has no code, for the access log."""
    body: Any = error_reply(error)[1].error
    record.error = body.code or body.type
