"""GET / and GET /page/{name}: the files of the page. They have no data of anyone, so they need no API key."""

import gzip
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.server.api import Api
from octavo.server.edge.dispatch import route
from octavo.server.errors import ApiError
from octavo.server.ollama.models import running
from octavo.server.openapi.operation import Operation

from . import live

FILES = Path(__file__).with_name("files")
INDEX = "index.html"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
NAMES = frozenset(file.name for file in FILES.iterdir())
PATHS = frozenset({"/", *(f"/page/{name}" for name in NAMES)})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # ask each time whether the ETag is still the same
    "vary": "accept, accept-encoding",
}


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent."""

    content: bytes
    compressed: bytes
    etag: str
    media_type: str


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    text = {"type": "string"}
    index = Operation(tag="Octavo", summary="Return the page, to browsers.", reply=text, media_type="text/plain")
    part = Operation(tag="Octavo", summary="Return a part of the page.", reply=text, media_type="text/javascript")
    return [route("GET", "/", page, index), route("GET", "/page/{name}", part_of_page, part), *live.routes(api)]


async def page(request: Request) -> Response:
    """Answer with the page. Programs, such as Ollama's clients, get a line of text."""
    if "text/html" not in request.headers.get("accept", ""):
        return await running(request)
    return _answer(request, INDEX)


async def part_of_page(request: Request) -> Response:
    """Answer with a file of the page. Raises ApiError 404."""
    name = request.path_params["name"]
    if name not in NAMES:
        raise ApiError(404, f"the page has no file {name}")
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    """Answer with a file, or 304 if the client has it."""
    file = _read(name)
    headers = HEADERS | {"etag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.compressed, headers=headers | {"content-encoding": "gzip"}, media_type=file.media_type)
    return Response(file.content, headers=headers, media_type=file.media_type)


@cache
def _read(name: str) -> PageFile:
    content = (FILES / name).read_bytes()
    etag = f'W/"{blake2b(content, digest_size=12).hexdigest()}"'  # weak: the same for both encodings
    return PageFile(content, gzip.compress(content, mtime=0), etag, MEDIA_TYPES[Path(name).suffix])
