"""TLS: accept connections, and run their handshakes, which count as connections and are bounded in time."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from .certificates import Certificates
from .http_protocol import Edge
from .limits import ConnectionLimit

ACCEPTED_AT_ONCE = 64  # connections, before others are served again
SHUTDOWN_SECONDS = 2.0  # for the client's answer when a connection is closed; an idle client does not give one
PAUSE_SECONDS = 1.0  # after an error, such as too many open files

log = logging.getLogger("octavo.server")


class TlsListener:
    """Accepts connections on a socket from the moment on that it is made.

    The event loop could do this by itself, but without a limit on the handshakes that are under way, and with the
    certificate that the server had when it started.

    Args:
        listener: a listening socket.
        certificates: their present context is used for each new connection.
        make_protocol: returns the HTTP protocol of a connection.
        edge: the limit for all connections, where a handshake counts as an idle one, and the time that it may take.
    """

    def __init__(
        self,
        listener: socket.socket,
        certificates: Certificates,
        make_protocol: Callable[[], asyncio.Protocol],
        edge: Edge,
    ):
        self._listener, self._certificates, self._make_protocol = listener, certificates, make_protocol
        self._connections, self._seconds = edge.connections, edge.config.header_timeout
        self._loop = asyncio.get_running_loop()
        listener.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Stop accepting."""
        self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        """Return at once: no connection depends on this object."""

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("connections cannot be accepted: %s", error)
                self.close()
                self._loop.call_later(PAUSE_SECONDS, self._resume)
                return
            handshake = Handshake(connection, self._make_protocol, self._connections)
            if self._connections.admit(handshake):
                handshake.task = self._loop.create_task(self._run(handshake))
                handshake.task.add_done_callback(handshake.ended)
            else:
                connection.close()

    async def _run(self, handshake: "Handshake") -> None:
        connection, context = handshake.connection, self._certificates.context
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # the client leaves, is too slow, or shows no valid certificate
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                lambda: handshake,
                connection,
                ssl=context,
                ssl_handshake_timeout=self._seconds,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS,
            )


class Handshake(asyncio.Protocol):
    """A connection until its handshake is complete. Then it gets its HTTP protocol."""

    def __init__(
        self, connection: socket.socket, make_protocol: Callable[[], asyncio.Protocol], connections: ConnectionLimit
    ):
        self.connection = connection
        self.task: asyncio.Task[None] | None = None
        self._make_protocol, self._connections = make_protocol, connections
        self._is_complete = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Hand over to the HTTP protocol, which counts itself as a connection."""
        self._is_complete = True
        self._connections.release(self)
        protocol = self._make_protocol()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)

    def ended(self, _: object) -> None:
        """Close a connection whose handshake has failed, or was cancelled before it began."""
        self._connections.release(self)
        if not self._is_complete:
            self.connection.close()

    def close_idle(self) -> None:
        if self.task is not None:
            self.task.cancel()
