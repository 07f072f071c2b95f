"""A TCP proxy that delays what the server answers."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

from server_process import free_port


class SlowProxy:
    """Passes on connections to a port of this machine.

    Attributes:
        delay: seconds before each part of an answer is passed on.
    """

    def __init__(self, target: int):
        self.delay, self.port, self._target = 0.0, free_port(), target
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._open = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    client.close()
                    continue
                self._open += [client, server]
                for source, sink, delays in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pass_on, args=(source, sink, delays), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, delays: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if delays:
                    time.sleep(self.delay)
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def slow_proxy(target: int) -> Iterator[SlowProxy]:
    proxy = SlowProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
