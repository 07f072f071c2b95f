"""uvicorn's server, with our settings and our idea of what a signal means."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Generator

import uvicorn
from fastapi import FastAPI

IDLE_SECONDS = 75  # longer than clients and proxies keep idle connections: they close first, and never lose a request
DRAIN_SECONDS = 60  # for running requests after the first signal


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or Ctrl-C stops accepting and lets running requests end; a second one ends them."""

    def __init__(self, app: FastAPI, on_ready: Callable[[], None]):
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",  # broken requests are not worth a line each
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=DRAIN_SECONDS,
            )
        )
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn raises a signal again when it has drained, so that the exit code tells of it; ours is to be 0."""
        loop = asyncio.get_running_loop()
        serving = asyncio.current_task()
        assert serving is not None

        def stop() -> None:
            if self.should_exit:
                serving.cancel()
            self.should_exit = True

        signals = (signal.SIGINT, signal.SIGTERM)
        for each in signals:
            loop.add_signal_handler(each, stop)
        try:
            yield
        except asyncio.CancelledError:
            if not self.should_exit:
                raise
            serving.uncancel()
        finally:
            for each in signals:
                loop.remove_signal_handler(each)
