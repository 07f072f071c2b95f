"""Reads the bodies of requests: bounded while they arrive, decompressed if need be, parsed as JSON."""

import asyncio
import contextlib
import zlib
from collections.abc import Callable
from typing import Any

import pydantic_core
from starlette.requests import ClientDisconnect, Request

from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError

from .access_log import CLIENT_LEFT
from .limits import ByteBudget

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors and languages put it before UTF-8 text
KEY_COST = 4  # values that take as long as the key of an object
ESCAPES = 4  # escapes in strings that take as long as one value
DIGITS = 32  # digits of long integers that take as long as one value
GZIP = 16 + zlib.MAX_WBITS

_MARKS = (b",", b"[", b"{", b"\\")
_UNCOUNTED = bytes(set(range(256)) - set(b"".join(_MARKS) + b"0123456789"))


class BodyReader:
    """Reads bodies within the limits of `config`, for one and for all of them together."""

    def __init__(self, config: ServerConfig):
        self._max_bytes = config.max_body_bytes
        self._max_values = config.max_json_values
        self._pending = ByteBudget(config.max_pending_body_bytes)

    async def read_json(self, request: Request, admit: Callable[[], object] = lambda: None) -> Any:
        """Return the body as dicts, lists and so on, with bounded depth and size, and no invalid Unicode.

        Args:
            admit: called when the body has arrived; if it raises, the body is not parsed.

        Raises ApiError: 413 too large, 415 not JSON or in an unknown encoding, 503 too many bodies, 400 not valid JSON.
        """
        # A web page can make a browser post text/plain to localhost, but not application/json.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send the header Content-Type: application/json", code="unsupported_media_type")
        body = await self._read(request)
        admit()
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
        if int(request.headers.get("content-length", "0")) > self._max_bytes:  # digits: the HTTP parser checks that
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
        """Return what a gzip body holds. The thread leaves the event loop free, since zlib releases the GIL."""
        stream = zlib.decompressobj(GZIP)
        with contextlib.suppress(zlib.error):
            plain = await asyncio.to_thread(stream.decompress, body, self._max_bytes + 1)
            if len(plain) > self._max_bytes:
                raise self._too_large()
            if stream.eof and not stream.unused_data:
                return plain
        raise ApiError(400, "the body is not valid gzip", code="invalid_encoding")

    async def _check_values(self, body: bytes | bytearray) -> None:
        """Bound the time that parsing takes on the event loop: 0.2 µs for a value, 1 for a key, 0.05 for an escape, and
        up to 0.01 for a digit, since an integer of n digits, at most 4,300, takes time proportional to n².

        Every value but the first follows a comma or an opening bracket. Those within strings are counted too. A large
        body is looked at in several turns of the loop. Raises ApiError 413.
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
