"""GET /openapi.json, and GET /docs: the same as one page of HTML, without scripts or anything from elsewhere."""

import asyncio
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from octavo.server.edge.dispatch import route
from octavo.server.openai.replies import Json

from .document import document
from .operation import Operation

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # of the page's contents


def documented(routes: list[Route], model: str) -> list[Route]:
    """Return `routes`, and the two routes that describe all of them.

    Args:
        model: the name that examples give for a model.
    """
    pages = _Pages(model)
    pages.routes = [
        *routes,
        route(
            "GET",
            "/openapi.json",
            pages.json,
            Operation(tag="Octavo", summary="Describe all routes, as an OpenAPI document.", reply=dict[str, Any]),
        ),
        route(
            "GET",
            "/docs",
            pages.html,
            Operation(
                tag="Octavo",
                summary="Describe all routes, as a page.",
                reply={"type": "string"},
                media_type="text/html",
            ),
        ),
    ]
    return pages.routes


class _Pages:
    """The handlers of the two routes. The first request makes the document, in a thread: it takes some 100 ms."""

    routes: list[Route]

    def __init__(self, model: str):
        self._model = model

    @cached_property
    def _document(self) -> dict[str, Any]:
        return document(self.routes, self._model)

    async def json(self, _: Request) -> Response:
        """Answer with the OpenAPI document."""
        return Json(await asyncio.to_thread(lambda: self._document))

    async def html(self, request: Request) -> Response:
        """Answer with the page. Its examples of commands have the server's address, as the client sees it."""
        page = await asyncio.to_thread(self._page, str(request.base_url).rstrip("/"))
        return HTMLResponse(page, headers={"content-security-policy": POLICY})

    def _page(self, url: str) -> str:
        groups: defaultdict[str, list[tuple[str, str, Any]]] = defaultdict(list)
        for path, operations in self._document["paths"].items():
            for method, operation in operations.items():
                groups[operation["tags"][0]].append((method, path, operation))
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(Path(__file__).with_name("page.html").read_text())
        return template.render(document=self._document, groups=groups, url=url)
