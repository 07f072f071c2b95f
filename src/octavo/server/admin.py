"""Routes for operators: GET /health, /ready, /stats and /version. They wait for an engine for a second at most."""

from functools import partial
from typing import Any, TypedDict

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.version import __version__

from .api import Api
from .edge.dispatch import route
from .openai.replies import Json
from .openapi.operation import Operation
from .stats import ServerStats, server_stats


class Readiness(TypedDict):
    """Whether requests are served now, and the reason if they are not."""

    ready: bool
    reason: str


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""

    def described(summary: str, **more: Any) -> Operation:
        return Operation(tag="Octavo", summary=summary, **more)

    return [
        route("GET", "/health", health, described("Answer as long as the server runs.")),
        route("GET", "/ready", partial(ready, api), described("Show whether requests are served.", reply=Readiness)),
        route("GET", "/stats", partial(stats, api), described("Return statistics of all models.", reply=ServerStats)),
        route("GET", "/version", version, described("Return the server's version.", reply=dict[str, str])),
    ]


async def health(_: Request) -> Response:
    """Answer 200 as long as this process serves, even while no engine is ready (see /ready)."""
    return Response()


async def ready(api: Api, _: Request) -> Response:
    """Answer 200 if requests are served now, else 503 with the reason."""
    is_ready, reason = readiness(api)
    return Json({"ready": is_ready, "reason": reason}, 200 if is_ready else 503)


def readiness(api: Api) -> tuple[bool, str]:
    """Return whether requests are served now, and the reason if they are not. Never waits."""
    if api.draining():
        return False, "the server is shutting down"
    return api.fleet.readiness()


async def stats(api: Api, _: Request) -> Response:
    """Answer with ServerStats. The statistics of an engine that does not report within a second are null."""
    return Json(await server_stats(api.fleet))


async def version(_: Request) -> Response:
    """Answer with the version of Octavo."""
    return Json({"version": __version__})
