"""HTTP/1 on one connection: uvicorn's protocol on httptools, with timeouts, limits and the corrections below.

- A request to upgrade to another protocol, such as h2c, is served over HTTP/1, including its body (RFC 9110,
  section 7.8). httptools alone stops at such a header and loses the body.
- A response to HTTP/1.0 is never chunked (RFC 9112, section 6.1); it ends with the connection.
- A client that closes its sending side after the request still gets its response; `_probe` detects a client that has
  disconnected.
- When a client disconnects, the application's task for it is cancelled.
- All errors are OpenAI's JSON, including those for malformed HTTP.
"""

import asyncio
import logging
import math
import select
import socket
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError, error_body
from octavo.server.openai.replies import encode

from .access_log import AccessLog, RequestRecord
from .ids import request_id
from .limits import ConnectionLimit

MIN_BODY_RATE = 65_536  # every so many bytes of a body extend its timeout by a second
LINGER_SECONDS = 2.0  # for which data of a refused client is discarded: closing at once could destroy the response
MAX_DISCARDED = 65_536  # bytes of an unneeded body that are read in order to keep the connection open
STATUS_START = b"HTTP/1.1 "  # the beginning of every response
PROBE_SECONDS = (0.02, 0.1, 0.5, 2.0)  # between probes of a half-closed connection; the last interval repeats
TCP = socket.IPPROTO_TCP
CLOSE_WAIT = 8  # the state, in Linux's TCP_INFO, of a connection whose peer has closed its sending side

log = logging.getLogger("octavo.server")


@dataclass(frozen=True)
class Edge:
    """The objects that all connections of a server share."""

    config: ServerConfig
    connections: ConnectionLimit
    access_log: AccessLog


class HttpProtocol(HttpToolsProtocol):
    """One connection, with the arguments of uvicorn's own protocol and `edge`."""

    def __init__(self, *arguments: Any, edge: Edge, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.edge = edge
        self._settings = edge.config
        self._timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._in_header = False
        self._header_size = 0  # bytes of the complete fields
        self._header_received = 0  # bytes of reads that contained nothing but header
        self._body_received = 0
        self._body_began = 0.0
        self._upgrading = False
        self._refusal: ApiError | None = None  # the error in the header that is being read
        self._running: Cycle | None = None  # the request being answered; self.cycle is the one being parsed
        self._lingering = False
        self._half_closed = False

    # Connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        if self.edge.connections.admit(self):
            self._set_timer(self._settings.first_byte_timeout, self.transport.close)
        else:
            self._refuse(ApiError(503, "the server has too many connections", code="too_many_connections"))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.edge.connections.release(self)
        self._set_timer(None)
        if self._send_timer is not None:
            self._send_timer.cancel()
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._running is not None:
            self._running.disconnect()
        # Break the reference cycle, so that this object and the bodies of its requests are freed at once.
        self.cycle = self._running = None  # type: ignore[assignment]

    def close_idle(self) -> None:
        self.transport.close()

    def shutdown(self) -> None:
        """Close the connection, after the current response if there is one."""
        if self._running is None:
            self.transport.close()
        else:
            self._running.keep_alive = False

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether to keep the half-closed connection, since a complete request waits for its response."""
        if self._lingering or self._running is None or self.cycle.more_body or self.scheme == "https":
            return False
        self._half_closed = True
        self._probe(0)
        return True

    def _probe(self, attempt: int) -> None:
        """Find out whether a client that has closed its sending side is still connected.

        A Unix socket says it. With TCP, a client that has closed its whole socket looks the same until something is
        sent to it. Its kernel then answers with a reset, which changes the state of the connection. So this sends the
        bytes with which every response begins, which do not affect a client that is still connected.
        """
        if self.transport.is_closing() or self._running is None:
            return
        if not _is_half_open(self.transport.get_extra_info("socket")):
            self.transport.abort()
            return
        self._running.begin()
        seconds = PROBE_SECONDS[min(attempt, len(PROBE_SECONDS) - 1)]
        self.loop.call_later(seconds, self._probe, attempt + 1)

    # Timeouts

    def _set_timer(self, seconds: float | None, action: Callable[[], object] | None = None) -> None:
        """Call `action` if the connection makes no progress for `seconds`; None cancels the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None and action is not None:
            self._timer = self.loop.call_later(seconds, action)

    def _header_late(self) -> None:
        limit = self._settings.header_timeout
        self._refuse(ApiError(408, f"the request's header did not arrive within {limit:g} s", code="header_timeout"))

    def _body_late(self) -> None:
        allowed = self._settings.body_timeout + self._body_received / MIN_BODY_RATE
        remaining = self._body_began + allowed - self.loop.time()
        if remaining > 0:
            self._set_timer(remaining, self._body_late)
        else:
            message = f"the request's body did not arrive within {allowed:.0f} s"
            self._refuse(ApiError(408, message, code="body_timeout"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self._settings.send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    # Requests

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        if self._in_header:
            self._header_received += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            malformed = ApiError(400, f"this is not valid HTTP/1.1: {error}", code="invalid_http")
            self._refuse(self._refusal or malformed)
            return
        if self._in_header and self._header_received > self._settings.max_header_bytes:
            self._refuse(self._header_too_long())

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stop:
            if self.parser.get_method() == b"CONNECT":
                self._refusal = ApiError(405, "CONNECT is not supported: this server is not a proxy")
                raise httptools.HttpParserError("CONNECT") from None
            self._feed_without_upgrade(data[stop.args[0] :])

    def _feed_without_upgrade(self, rest: bytes) -> None:
        """Parse the header again without the fields that made httptools stop, then parse `rest`."""
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(
                    option for option in options if option.lower() not in (b"upgrade", b"http2-settings")
                )
            if name not in (b"upgrade", b"http2-settings"):
                lines.append(b"%b: %b" % (name, value))
        self._upgrading = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_header = True
        self._header_size = self._header_received = 0
        self.edge.connections.set_busy(self)
        if self._running is None:
            self._set_timer(self._settings.header_timeout, self._header_late)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_header(len(name) + len(value) + 4)
        if name.lower() == b"transfer-encoding" and value.strip().lower() != b"chunked":
            self._refusal = ApiError(
                501, "of Transfer-Encoding, chunked alone is supported; compress a body with Content-Encoding: gzip"
            )
            raise self._refusal

    def _count_header(self, size: int) -> None:
        self._header_size += size
        if self._header_size > self._settings.max_header_bytes or len(self.headers) > self._settings.max_header_count:
            self._refusal = self._header_too_long()
            raise self._refusal

    def _header_too_long(self) -> ApiError:
        size, count = self._settings.max_header_bytes, self._settings.max_header_count
        message = f"the request's header has more than {size} bytes or {count} fields"
        return ApiError(431, message, code="header_too_long")

    def on_headers_complete(self) -> None:
        self._in_header = False
        if self.parser.should_upgrade():
            self._upgrading = True  # the parser stops here, and `_feed` continues
            return
        version = self.parser.get_http_version()
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["http_version"] = version
        self.scope["path"] = urllib.parse.unquote(path) if "%" in path else path
        self.scope["raw_path"] = url.path
        self.scope["query_string"] = url.query or b""
        record = RequestRecord(request_id(self.headers), self.scope["method"], self.scope["path"], self._client_host)
        self.scope["octavo.record"] = record  # type: ignore[typeddict-unknown-key]
        # The tasks for which a draining server waits, and which it cancels at the end. A route may add its own.
        self.scope["octavo.tasks"] = self.tasks  # type: ignore[typeddict-unknown-key]
        self.cycle = cycle = Cycle(self, record, version != "1.0" and self.parser.should_keep_alive())
        if self._running is None:
            self._run(cycle)
        else:
            self.flow.pause_reading()
            self.pipeline.append(cycle)  # type: ignore[arg-type]

    def on_body(self, body: bytes) -> None:
        if not self._upgrading:
            self._body_received += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._upgrading:
            if self.cycle is self._running:
                self._set_timer(None)
            elif self._running is None:  # the end of a body that the response did not need
                self._set_timer(self._settings.idle_timeout, self.transport.close)
            self.cycle.more_body = False
            self.cycle.message_event.set()

    def _run(self, cycle: "Cycle") -> None:
        self._running = cycle
        if cycle.more_body:
            self._body_received, self._body_began = 0, self.loop.time()
            self._set_timer(self._settings.body_timeout, self._body_late)
        cycle.task = task = self.loop.create_task(cycle.run(self.app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def response_complete(self, cycle: "Cycle") -> None:
        """Serve the next request after a response, or close the connection."""
        self.server_state.total_requests += 1
        self._running = None
        if self.transport.is_closing():
            return
        if self._lingering or (cycle.more_body and not cycle.keep_alive):
            self._linger()
        elif self.pipeline:
            self.flow.resume_reading()
            self._run(self.pipeline.popleft())  # type: ignore[arg-type]
        elif self._half_closed or not cycle.keep_alive:
            self.transport.close()
        else:
            self.flow.resume_reading()
            self.edge.connections.set_idle(self)
            timeout = self._settings.body_timeout if cycle.more_body else self._settings.idle_timeout
            self._set_timer(timeout, self.transport.close)

    def _refuse(self, error: ApiError) -> None:
        """Answer malformed or slow input with an error, and close the connection."""
        running, self._lingering = self._running, True
        if running is not None and (running.response_started or not running.more_body):
            running.keep_alive = False  # the error follows a valid request, which still gets its response
            return
        record = running.record if running else RequestRecord(request_id([]), "-", "-", self._client_host)
        record.error, record.status, record.complete = error.code, error.status, True
        status, reply = error_body(error, record.path)
        body = encode(reply)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        headers = [*self.server_state.default_headers, *record.start_headers(), *headers]
        self.transport.write(header(status, headers) + body)
        if running is None:
            self.edge.access_log.write(record)
        else:
            running.disconnect()
        self._linger()

    def _linger(self) -> None:
        """Close the sending side and discard what still arrives: closing at once could destroy the response."""
        self._lingering = True
        self.pipeline.clear()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._set_timer(LINGER_SECONDS, self.transport.close)

    @property
    def _client_host(self) -> str:
        return self.client[0] if self.client else "-"


def _is_half_open(connection: socket.socket) -> bool:
    """Return whether a peer that has closed its sending side still reads, as far as its kernel has said."""
    if connection.family == socket.AF_UNIX:
        poll = select.poll()
        poll.register(connection.fileno(), 0)
        return not poll.poll(0)  # POLLHUP is reported in any case
    return hasattr(socket, "TCP_INFO") and connection.getsockopt(TCP, socket.TCP_INFO, 1)[0] == CLOSE_WAIT


def header(status: int, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the status line and the header of a response."""
    parts = [STATUS_LINE[status]]
    for name, value in fields:
        parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)


class Cycle(RequestResponseCycle):
    """One request and its response, with the ASGI callables `receive` (uvicorn's) and `send`."""

    def __init__(self, protocol: HttpProtocol, record: RequestRecord, keep_alive: bool):
        super().__init__(
            scope=protocol.scope,
            transport=protocol.transport,
            flow=protocol.flow,
            logger=log,
            access_logger=log,
            access_log=False,
            default_headers=protocol.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=protocol.expect_100_continue,
            keep_alive=keep_alive,
            on_response=lambda: None,
        )
        self.record = record
        self.task: asyncio.Task[None] | None = None
        self._protocol = protocol
        self._begun = False  # whether STATUS_START was sent
        self._header = b""  # of the response, until its body begins

    async def run(self, app: Any) -> None:
        """Call the application, and complete or close a response that it leaves unfinished."""
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            pass
        except Exception:
            log.exception("a request failed")
        finally:
            if not self.response_complete and not self.disconnected:
                self.transport.close()
            if self.disconnected and not self.record.complete:
                self.record.error = None  # the client disconnected, which is logged as status 499
            self._protocol.edge.access_log.write(self.record)

    def disconnect(self) -> None:
        """Cancel the application's task, because the client has disconnected."""
        self.disconnected = True
        self.message_event.set()
        if self.task is not None and not self.response_complete:
            self.task.cancel()

    def begin(self) -> None:
        """Send the bytes with which every response begins, unless they were sent already."""
        if not self._begun and not self.response_started:
            self._begun = True
            self.transport.write(STATUS_START)

    async def send(self, message: Any) -> None:
        """Send one ASGI message of a response. The header is held back until the first part of the body."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected or self.response_complete:
            return
        if message["type"] == "http.response.start":
            self._header = self._response_header(message["status"], message["headers"])
            return
        body, more = message["body"], message.get("more_body", False)
        if self.scope["method"] == "HEAD":
            body = b""
        elif self.chunked_encoding:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if not more:
                body += b"0\r\n\r\n"
        if self._header:
            body, self._header = self._header + body, b""
        self.transport.write(body)
        if not more:
            self.response_complete = self.record.complete = True
            self._protocol.response_complete(self)

    def _response_header(self, status: int, fields: list[tuple[bytes, bytes]]) -> bytes:
        self.response_started = True
        self.waiting_for_100_continue = False
        self.record.status = status
        every = [*self.default_headers, *self.record.start_headers(), *fields]
        sized = status in (204, 304) or any(name == b"content-length" for name, _ in fields)
        if not sized and self.scope["method"] != "HEAD":
            self.chunked_encoding = self.scope["http_version"] != "1.0"
            if self.chunked_encoding:
                every.append((b"transfer-encoding", b"chunked"))
            else:
                self.keep_alive = False
        if self.more_body and self._declared_body() > MAX_DISCARDED:
            self.keep_alive = False
        if not self.keep_alive:
            every.append((b"connection", b"close"))
        start = header(status, every)
        return start[len(STATUS_START) :] if self._begun else start

    def _declared_body(self) -> float:
        """Return the size of the request's body in bytes; infinity if it is chunked."""
        return next((float(value) for name, value in self.scope["headers"] if name == b"content-length"), math.inf)
