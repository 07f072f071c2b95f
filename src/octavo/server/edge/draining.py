"""uvicorn's server with Octavo's HTTP protocol and signal handling."""

import asyncio
import contextlib
import functools
import signal
import socket
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.server import logger as uvicorn_log

from octavo.server.config import ServerConfig
from octavo.server.listeners import BACKLOG

from .access_log import AccessLog
from .http_protocol import Edge, HttpProtocol
from .limits import ConnectionLimit

if TYPE_CHECKING:
    from .certificates import Certificates

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CANCEL_SECONDS = 1.0  # time for requests that the drain timeout ended to send their error


class DrainingServer(uvicorn.Server):
    """Serves an ASGI application on listening sockets until it is stopped, then lets running requests finish.

    Args:
        app: the ASGI application.
        config: timeouts and limits.
        access_log: receives a record of each request.
        on_ready: called when the server accepts requests.
        certificates: for HTTPS; None for HTTP.
    """

    def __init__(
        self,
        app: Any,
        config: ServerConfig,
        access_log: AccessLog,
        on_ready: Callable[[], None],
        certificates: "Certificates | None" = None,
    ):
        self._edge, self._certificates = Edge(config, ConnectionLimit(config.max_connections), access_log), certificates
        uvicorn_log.disabled = True  # it logs malformed requests, which are in the access log already
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=config.drain_timeout,  # type: ignore[arg-type]
            )
        )
        self._on_ready = on_ready

    def stop(self) -> None:
        """Stop accepting connections and let running requests finish, for `drain_timeout` seconds at most."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections. uvicorn's own would take a Unix socket for one of TCP."""
        self.servers = [await self._accept(listener) for listener in sockets or ()]
        self.started = True
        self._on_ready()

    async def _accept(self, listener: socket.socket) -> Any:
        make_protocol = functools.partial(
            HttpProtocol, config=self.config, server_state=self.server_state, app_state={}, edge=self._edge
        )
        if self._certificates is not None:
            from .tls import TlsListener  # imported late, as most servers speak HTTP

            return TlsListener(listener, self._certificates, make_protocol, self._edge)
        loop = asyncio.get_running_loop()
        create = loop.create_unix_server if listener.family == socket.AF_UNIX else loop.create_server
        return await create(make_protocol, sock=listener, backlog=BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._edge.connections.close_idle()  # those in the TLS handshake, too, which uvicorn does not know
        await super().shutdown(sockets)
        if self.server_state.tasks:  # cancelled by the drain timeout; each sends its error
            await asyncio.wait(set(self.server_state.tasks), timeout=CANCEL_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to `on_signals`: uvicorn would raise them again after draining."""
        yield


@contextlib.contextmanager
def on_signals(action: Callable[[], None]) -> Generator[None, None, None]:
    """Call `action` on the event loop for every SIGINT, SIGTERM and SIGHUP. SIGHUP stays ignored if it was (nohup)."""
    loop = asyncio.get_running_loop()
    signals = [each for each in SIGNALS if each is not signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]
    for each in signals:
        loop.add_signal_handler(each, action)
    try:
        yield
    finally:
        for each in signals:
            loop.remove_signal_handler(each)
