"""Authentication: check the API keys of requests and the keys' limits, and set each request's tenant."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any

from octavo.server.errors import ApiError
from octavo.tenants.key import Key
from octavo.tenants.window import SlidingWindow

from .access_log import RequestRecord

if TYPE_CHECKING:
    from octavo.tenants.key_ring import KeyRing

OPEN = ("/health", "/ready")  # routes that need no key, on every server
OPERATED = ("/v1/admin/", "/stats", "/metrics")  # routes about all tenants: they need the admin key
TENANT_HEADER = b"x-octavo-tenant"

Header = tuple[bytes, bytes]


@dataclass(slots=True)
class _Use:
    """What is done with a key now, and what was done in the last minute."""

    running: int = 0
    requests: SlidingWindow | None = field(default=None)


class Authentication:
    """Checks the API key of each request, and counts it towards the key's limits.

    Args:
        ring: the keys.
        admit_operator: raises ApiError unless an ASGI request has the admin key.
        clock: seconds that do not go back.
        also_open: further paths that need no key.
    """

    def __init__(
        self,
        ring: "KeyRing",
        admit_operator: Callable[[Any], None],
        clock: Callable[[], float] = time.monotonic,
        also_open: Collection[str] = (),
    ):
        self._open = frozenset((*OPEN, *also_open))
        self._ring, self._admit_operator, self._clock = ring, admit_operator, clock
        self._uses: dict[str, _Use] = {}

    def enter(self, scope: Any, record: RequestRecord) -> Callable[[], None] | None:
        """Check a request's key, and name its tenant in `scope` in place of what the client says.

        Returns:
            A function to be called when the response has ended; None if nothing is counted.

        Raises:
            ApiError: 401 for no valid key, 403 for a route that the key does not allow, 429 beyond the key's limits.
        """
        path = scope["path"]
        if path in self._open:
            return None
        if path.startswith(OPERATED):
            self._admit_operator(scope)
            return None
        key = self._key_of(scope["headers"])
        if not key.allows_path(path):
            raise ApiError(403, f"this API key may not be used for {path}", code="route_not_allowed")
        record.key = key
        if not key.names_tenants:
            others = [header for header in scope["headers"] if header[0] != TENANT_HEADER]
            scope["headers"] = [*others, (TENANT_HEADER, key.owner.encode("latin-1"))]
        return self._count(key, record)

    def _key_of(self, headers: list[Header]) -> Key:
        secret = _secret_in(headers)
        if secret is None:
            raise _refused("this server needs an API key: send the header Authorization: Bearer KEY", "missing_api_key")
        key = self._ring.find(secret)
        if key is None:
            raise _refused("the API key is not valid", "invalid_api_key")
        if key.is_expired(time.time()):
            raise _refused(f"the API key {key.name} has expired", "expired_api_key")
        return key

    def _count(self, key: Key, record: RequestRecord) -> Callable[[], None]:
        """Count a request, and return the function that ends it. Raises ApiError 429."""
        use = self._uses.setdefault(key.name, _Use())
        if key.concurrent_requests is not None and use.running >= key.concurrent_requests:
            raise _too_many(f"the key {key.name} has {use.running} requests at the same time, its limit", 1.0)
        if key.requests_per_minute is not None:
            self._take(use, key, record)
        use.running += 1

        def leave() -> None:
            use.running -= 1

        return leave

    def _take(self, use: _Use, key: Key, record: RequestRecord) -> None:
        now, limit = self._clock(), key.requests_per_minute
        assert limit is not None
        if use.requests is None or use.requests.limit != limit:
            use.requests = SlidingWindow(limit)
        wait = use.requests.take(now)
        record.response_headers += [
            (b"x-ratelimit-limit-requests", b"%d" % limit),
            (b"x-ratelimit-remaining-requests", b"%d" % use.requests.remaining(now)),
            (b"x-ratelimit-reset-requests", b"%.3fs" % use.requests.seconds_until_empty(now)),
        ]
        if wait:
            raise _too_many(f"the key {key.name} has made {limit} requests in the last minute, its limit", wait)


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


def _too_many(message: str, seconds: float) -> ApiError:
    headers = {"retry-after": str(ceil(seconds)), "retry-after-ms": str(ceil(1000 * seconds))}
    return ApiError(429, message, code="rate_limit_exceeded", headers=headers)
