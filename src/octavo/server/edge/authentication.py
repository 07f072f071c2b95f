"""Authentication: check the API keys of requests and the keys' limits, and set each request's tenant."""

import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from octavo.server.errors import ApiError
from octavo.tenants.key import Key

from .access_log import RequestRecord
from .key_use import KeyLimits, KeyUse

if TYPE_CHECKING:
    from octavo.tenants.key_ring import KeyRing

OPEN = ("/health", "/ready")  # routes that need no key, on every server
OPERATED = ("/v1/admin/", "/stats", "/metrics")  # routes about all tenants: they need the admin key
SHARED = ("/get_load",)  # routes about all tenants that routers query: they need a key that names tenants
COMPUTED = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
        *("/v1/embeddings", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank", "/v1/decisions"),
        *("/api/chat", "/api/generate", "/api/embed", "/api/embeddings"),
    }
)
"""Routes whose requests may wait for the limits of their key: each chooses a model by `Api.model`."""
TENANT_HEADER = b"x-octavo-tenant"

Header = tuple[bytes, bytes]


class Authentication:
    """Checks the API key of each request, and counts it towards the key's limits.

    Args:
        ring: the keys.
        admit_operator: raises ApiError unless an ASGI request has the admin key.
        limits: the limits of the keys.
        also_open: further paths that need no key.
    """

    def __init__(
        self,
        ring: "KeyRing",
        admit_operator: Callable[[Any], None],
        limits: KeyLimits,
        also_open: Collection[str] = (),
    ):
        self.ring, self.limits = ring, limits
        self._admit_operator = admit_operator
        self._open = frozenset((*OPEN, *also_open))

    async def enter(self, scope: Any, record: RequestRecord) -> None:
        """Check a request's key, note it in `record`, and name its tenant in `scope` in place of what the client says.

        Raises:
            ApiError: 401 for no valid key, 403 for a route that the key does not allow, 429 beyond the key's limits.
        """
        path = scope["path"]
        if path in self._open:
            return
        if path.startswith(OPERATED):
            self._admit_operator(scope)
            return
        key = self._key_of(scope["headers"])
        if not key.allows_path(path) or (path.startswith(SHARED) and not key.names_tenants):
            raise ApiError(403, f"this API key may not be used for {path}", code="route_not_allowed")
        record.key = key
        if not key.names_tenants:
            others = [header for header in scope["headers"] if header[0] != TENANT_HEADER]
            scope["headers"] = [*others, (TENANT_HEADER, key.owner.encode("latin-1"))]
        use = KeyUse(self.limits, key, record, may_wait=path in COMPUTED and scope["method"] == "POST")
        if not use.may_wait:
            await use.enter()
        record.use = use

    def _key_of(self, headers: list[Header]) -> Key:
        secret = _secret_in(headers)
        if secret is None:
            raise _refused("this server needs an API key: send the header Authorization: Bearer KEY", "missing_api_key")
        key = self.ring.find(secret)
        if key is None:
            raise _refused("the API key is not valid", "invalid_api_key")
        if key.is_expired(time.time()):
            raise _refused(f"the API key {key.name} has expired", "expired_api_key")
        return key


def _secret_in(headers: list[Header]) -> str | None:
    """Return the key that a request sends: as a bearer token, or as Anthropic's clients or Azure's send it."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            if scheme.lower() == b"bearer" and token.strip():
                return token.strip().decode("latin-1")
        elif name in (b"x-api-key", b"api-key") and value.strip():
            return value.strip().decode("latin-1")
    return None


def _refused(message: str, code: str) -> ApiError:
    return ApiError(401, message, code=code, headers={"www-authenticate": "Bearer"})
