"""A TCP proxy that slows down what the client sends, or delays what the server answers."""

import contextlib
import math
import socket
import threading
import time
from collections.abc import Iterator

from server_process import free_port

_PART = 65536  # bytes that are passed on at a time


class SlowProxy:
    """Passes on connections to a port of this machine.

    Attributes:
        delay: seconds before each part of an answer is passed on.
        rate: bytes per second that are taken from a client.
    """

    def __init__(self, target: int):
        self.delay, self.rate, self.port, self._target = 0.0, math.inf, free_port(), target
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PART)  # so that little waits in the kernel
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
                for source, sink, is_answer in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pass_on, args=(source, sink, is_answer), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_PART):
                time.sleep(self.delay if is_answer else len(data) / self.rate)
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
