"""Read the bodies of requests within limits, decompress them if necessary, and parse them as JSON."""

import asyncio
import contextlib
import zlib
from collections.abc import Callable
from typing import Any

import pydantic_core
from starlette.requests import ClientDisconnect, Request

from octavo.server.config import ServerConfig
from octavo.server.errors import OLLAMA, ApiError

from .access_log import CLIENT_LEFT, RequestRecord
from .limits import ByteBudget

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors and languages put it before UTF-8 text
KEY_COST = 4  # parsing a key of an object takes as long as this many values
ESCAPES = 4  # parsing this many escapes in strings takes as long as one value
DIGITS = 32  # parsing this many digits of long integers takes as long as one value
HASHED_AT_ONCE = 1 << 18  # bytes of a body, for the audit log, which takes at most a millisecond
GZIP = 16 + zlib.MAX_WBITS

_MARKS = (b",", b"[", b"{", b"\\")
_UNCOUNTED = bytes(set(range(256)) - set(b"".join(_MARKS) + b"0123456789"))


class BodyReader:
    """Reads bodies within the limits of `config`: those for each body and those for all bodies together."""

    def __init__(self, config: ServerConfig):
        self._max_bytes = config.max_body_bytes
        self._max_values = config.max_json_values
        self._pending = ByteBudget(config.max_pending_body_bytes)

    async def read_json(self, request: Request, admit: Callable[[], object] = lambda: None) -> Any:
        """Read a request's body and parse it. Depth and size of the result are bounded; its text is valid Unicode.

        Args:
            admit: called when the body has arrived; if it raises, the body is not parsed.

        Raises ApiError: 400 for invalid JSON, 413 for a body that is too large, 415 for another content type or an
            unknown encoding, 503 if too many bodies are arriving.
        """
        if not _is_json(request):
            raise ApiError(415, "send the header Content-Type: application/json", code="unsupported_media_type")
        body = await self._read(request)
        admit()
        if (evidence := RequestRecord.of(request.scope).evidence) is not None:
            if len(body) > HASHED_AT_ONCE:
                await asyncio.to_thread(evidence.add_body, body)  # hashing releases the GIL
            else:
                evidence.add_body(body)
        if body.startswith(BYTE_ORDER_MARK):
            body = body[len(BYTE_ORDER_MARK) :]
        await self._check_values(body)
        try:
            return pydantic_core.from_json(body)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None

    async def _read(self, request: Request) -> bytes | bytearray:
        encoding = request.headers.get("content-encoding", "").strip().lower() or "identity"
        if encoding not in ("identity", "gzip", "x-gzip"):
            raise ApiError(415, "Content-Encoding must be gzip or left out", code="unsupported_media_type")
        if (
            int(request.headers.get("content-length", "0")) > self._max_bytes
        ):  # the HTTP parser has checked that it is a number
            raise self._too_large()
        body = bytearray()
        try:
            async for chunk in request.stream():
                self._pending.acquire(len(chunk))
                body += chunk
                if len(body) > self._max_bytes:
                    raise self._too_large()
            return body if encoding == "identity" else await self._decompress(body)
        except ClientDisconnect:
            raise ApiError(CLIENT_LEFT, "the client left before its whole body had arrived") from None
        finally:
            self._pending.release(len(body))

    async def _decompress(self, body: bytearray) -> bytes:
        """Decompress a gzip body, in a thread so that the event loop stays free: zlib releases the GIL."""
        stream = zlib.decompressobj(GZIP)
        with contextlib.suppress(zlib.error):
            plain = await asyncio.to_thread(stream.decompress, body, self._max_bytes + 1)
            if len(plain) > self._max_bytes:
                raise self._too_large()
            if stream.eof and not stream.unused_data:
                return plain
        raise ApiError(400, "the body is not valid gzip", code="invalid_encoding")

    async def _check_values(self, body: bytes | bytearray) -> None:
        """Raise ApiError 413 if parsing the body would block the event loop for too long.

        Parsing takes about 0.2 µs for a value, 1 µs for a key, 0.05 µs for an escape and up to 0.01 µs for a digit (an
        integer of n digits, at most 4,300, takes time proportional to n²). The number of values is estimated from
        commas and opening brackets, since every value but the first follows one; those inside strings count too.
        The search of a large body is split over several turns of the event loop.
        """
        if len(body) <= self._max_values:
            return
        values = KEY_COST * body.count(b'":')
        await asyncio.sleep(0)
        counted = body.translate(None, _UNCOUNTED)
        marks = []
        for mark in _MARKS:
            await asyncio.sleep(0)
            marks.append(counted.count(mark))
        values += sum(marks[:-1]) + marks[-1] // ESCAPES + (len(counted) - sum(marks)) // DIGITS
        if values > self._max_values:
            message = f"the body has more than {self._max_values} JSON values (max_json_values)"
            raise ApiError(413, message, code="body_too_large")
        await asyncio.sleep(0)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_bytes} bytes (max_body_bytes)", code="body_too_large")


def _is_json(request: Request) -> bool:
    """Return whether a request's header allows its body to be read as JSON.

    A web page can make a browser post any text to localhost, but not as application/json. Clients of Ollama leave the
    type out. A browser that does so adds the field Origin.
    """
    headers = request.headers
    if request.url.path.startswith(OLLAMA) and "content-type" not in headers:
        return "origin" not in headers
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
