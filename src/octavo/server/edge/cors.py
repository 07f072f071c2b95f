"""Cross-origin requests: which web pages may call the server (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

from collections.abc import Collection

Headers = list[tuple[bytes, bytes]]

PREFLIGHT_SECONDS = b"600"  # for which a browser may cache the answer to a preflight request
EXPOSED = b"x-request-id, openai-processing-ms, retry-after"
_METHODS = b"GET, HEAD, POST, DELETE, OPTIONS"


def response_headers(request: Headers, allowed: Collection[str]) -> Headers:
    """Return the header fields that allow the web page that sent `request` to read the response.

    Args:
        request: the request's header, names in lower case.
        allowed: origins such as https://example.org, or "*" for all origins; empty turns CORS off.
    """
    if not allowed:
        return []
    origin = _value(request, b"origin")
    if "*" in allowed:
        return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED)]
    vary = [(b"vary", b"origin")]
    if origin is None or origin.decode("latin-1").rstrip("/") not in allowed:
        return vary
    return [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED), *vary]


def preflight_headers(request: Headers, allowed: Collection[str]) -> Headers:
    """Return the header fields of a response to OPTIONS, in addition to those of `response_headers`."""
    if not allowed or _value(request, b"access-control-request-method") is None:
        return [(b"allow", _METHODS)]
    wanted = _value(request, b"access-control-request-headers") or b"authorization, content-type"
    return [
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-allow-headers", wanted),
        (b"access-control-max-age", PREFLIGHT_SECONDS),
    ]


def _value(headers: Headers, wanted: bytes) -> bytes | None:
    return next((value for name, value in headers if name == wanted), None)
