"""GET /v1/admin/keys: what the API keys may use, and have used, with the admin key."""

from functools import partial
from typing import TypedDict

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.tenants.key import Key

from .config import ServerConfig
from .edge.authentication import Authentication
from .edge.dispatch import route
from .models_admin import check_key
from .openai.replies import Json
from .openapi.operation import Operation

PATH = "/v1/admin/keys"


class KeyUsage(TypedDict):
    """A key with its limits, and the tokens of this calendar month (UTC), those of running requests included."""

    name: str
    tenant: str | None
    requests_per_minute: int | None
    concurrent_requests: int | None
    tokens_per_minute: int | None
    monthly_tokens: int | None
    tokens_this_month: int


class KeyList(TypedDict):
    """All keys that the server accepts."""

    data: list[KeyUsage]


def routes(config: ServerConfig, authentication: Authentication) -> list[Route]:
    """Return the route of this family."""
    listed = Operation(
        tag="Octavo", summary="Return the API keys and what they have used.", reply=KeyList, needs_key=True
    )
    return [route("GET", PATH, partial(list_keys, config, authentication), listed)]


async def list_keys(config: ServerConfig, authentication: Authentication, request: Request) -> Response:
    """Answer with all keys. Raises ApiError 401 or 403."""
    check_key(config.admin_key, request.headers)
    limiter = authentication.limits.limiter
    keys = authentication.ring.keys
    return Json(KeyList(data=[_usage(key, await limiter.used_this_month(key)) for key in keys]))


def _usage(key: Key, tokens: int) -> KeyUsage:
    return KeyUsage(
        name=key.name,
        tenant=None if key.names_tenants else key.owner,
        requests_per_minute=key.requests_per_minute,
        concurrent_requests=key.concurrent_requests,
        tokens_per_minute=key.tokens_per_minute,
        monthly_tokens=key.monthly_tokens,
        tokens_this_month=tokens,
    )
