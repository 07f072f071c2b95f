"""TLS handshakes, which count as connections and are bounded in time."""

import asyncio
import contextlib
import ssl
from collections.abc import Callable

from .limits import ConnectionLimit


class Handshake(asyncio.Protocol):
    """A connection whose TLS handshake is under way. After it, the connection gets its HTTP protocol.

    uvloop would start a handshake by itself, but without a limit on how many there are, and with the certificate that
    the server had when it started.

    Args:
        context: the certificate.
        seconds: after which the connection is closed.
        make_protocol: returns the HTTP protocol.
        connections: the limit for all connections. A handshake counts as an idle one.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        seconds: float,
        make_protocol: Callable[[], asyncio.Protocol],
        connections: ConnectionLimit,
    ):
        self._context, self._seconds = context, seconds
        self._make_protocol, self._connections = make_protocol, connections
        self._received: list[bytes] = []
        self._transport: asyncio.Transport
        self._task: asyncio.Task[None]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        if self._connections.admit(self):
            transport.pause_reading()  # until the handshake reads
            self._task = asyncio.ensure_future(self._shake_hands())
        else:
            transport.abort()

    async def _shake_hands(self) -> None:
        loop, secured = asyncio.get_running_loop(), None
        with contextlib.suppress(OSError):  # the client leaves, is too slow, or shows no valid certificate
            secured = await loop.start_tls(
                self._transport, self, self._context, server_side=True, ssl_handshake_timeout=self._seconds
            )
        self._connections.release(self)
        if secured is None or secured.is_closing():
            return
        protocol = self._make_protocol()
        secured.set_protocol(protocol)
        protocol.connection_made(secured)
        for data in self._received:
            protocol.data_received(data)

    def data_received(self, data: bytes) -> None:
        """Keep what arrives together with the end of the handshake."""
        self._received.append(data)

    def close_idle(self) -> None:
        self._transport.abort()
