"""GET /metrics, in Prometheus's text format."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.server.edge.dispatch import route
from octavo.server.openapi.operation import Operation

from .exporter import Exporter
from .text_format import CONTENT_TYPE


def routes(exporter: Exporter) -> list[Route]:
    """Return the routes of this family."""
    operation = Operation(tag="Octavo", summary="Return metrics for Prometheus.", reply=str, media_type="text/plain")
    return [route("GET", "/metrics", partial(metrics, exporter), operation)]


async def metrics(exporter: Exporter, _: Request) -> Response:
    """Answer with all metrics. Waits a second at most for an engine's statistics; then its latest ones are used."""
    return Response(await exporter.scrape(), media_type=CONTENT_TYPE)
