"""A real Redis on a port that the kernel chose."""

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Iterator

import pytest

from server_process import free_port, wait_for_port

REDIS = shutil.which("redis-server")


class RedisServer:
    """A Redis that keeps nothing on disk. It can be stopped, and started again on the same port."""

    def __init__(self, *options: str) -> None:
        self.port, self._options = free_port(), options
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        assert REDIS is not None
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([REDIS, *options, *self._options], stdout=subprocess.DEVNULL)
        wait_for_port(self.port)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop(self) -> None:
        self.signal(signal.SIGCONT)  # in case a test has stopped it
        self._process.terminate()
        self._process.wait(timeout=10)


@contextlib.contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """Run a Redis for a `with` block; skip the test where it is not installed."""
    if REDIS is None:
        pytest.skip("redis-server is not installed")
    server = RedisServer(*options)
    try:
        yield server
    finally:
        server.stop()
