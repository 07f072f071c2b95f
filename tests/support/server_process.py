"""Real servers on a port that the kernel chose: `octavo serve` in a process of its own, or on the loop of the test."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import httpx

from octavo import AsyncLLM
from octavo.fleet.fleet import Fleet
from octavo.server.app import create_app
from octavo.server.config import ServerConfig
from octavo.server.edge.access_log import AccessLog
from octavo.server.edge.draining import DrainingServer

COMPLETIONS = "/v1/completions"


class ServerProcess:
    """Serves `model` for a `with` block, at the end of which it must drain and have printed no traceback.

    Without `model`, the flags name the models. Keywords are variables of its environment.
    """

    def __init__(self, model: Path | str | None, *flags: str, **environment: str):
        self.banner = ""
        self.url = ""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with this object)
        command = [sys.executable, "-m", "octavo.entrypoints.openai.api_server", "--port", "0"]
        if model is not None:
            command += ["--model", str(model), "--served-model-name", "tiny"]
        self.process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE, stderr=self._errors, text=True, env=os.environ | environment,
        )  # fmt: skip

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.banner += line
            if line.startswith("curl"):
                break
        else:
            raise AssertionError(f"the server did not start: {self.stderr()}")
        match = re.search(r"https?://[\w.:]+", self.banner)
        assert match
        self.url = match[0]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.signal(signal.SIGTERM)
        code = self.process.wait(timeout=30)
        stderr = self.stderr()
        if kind is None:
            assert code == 0, stderr
            assert "Traceback" not in stderr, stderr

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stderr(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    def wait_until_closed(self) -> None:
        """Until new connections are refused."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                socket.create_connection(self.address, timeout=10).close()
            except OSError:
                return
        raise AssertionError("the server still accepts connections")

    def engine_pid(self, other_than: int | None = None) -> int:
        """Of the engine process, a child of the server; waits for another one than `other_than`."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for child in self.engine_pids():
                if child != other_than:
                    return child
            time.sleep(0.005)
        raise AssertionError("no engine process was started")

    def engine_pids(self) -> set[int]:
        """Of all engine processes, whichever thread of the server has started them."""
        found = set[int]()
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                for child in (task / "children").read_text().split():
                    if b"engine_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                        found.add(int(child))
        return found


def free_port() -> int:
    """A port of 127.0.0.1 that nothing uses now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_for_port(port: int) -> None:
    """Until something accepts connections on 127.0.0.1."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
            return
        time.sleep(0.005)
    raise AssertionError(f"nothing listens on port {port}")


@contextlib.asynccontextmanager
async def serving(
    model: Path, config: ServerConfig | None = None, access_log: AccessLog | None = None, **settings: Any
) -> AsyncIterator[tuple[AsyncLLM, DrainingServer, Any]]:
    """A server on the loop of the test, which can ask its engine what it runs; and its address."""
    async with AsyncLLM(str(model), **settings) as llm, asyncio.timeout(60):
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        config = config or ServerConfig()
        app = create_app(Fleet.of(llm), config, draining=lambda: server.should_exit)
        server = DrainingServer(app, config, access_log or AccessLog("none", None), on_ready=lambda: None)
        task = asyncio.ensure_future(server.serve([listener]))
        yield llm, server, address
        server.should_exit = True
        await task


async def post(
    address: Any, body: Any, path: str = COMPLETIONS, *headers: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(_http_post(path, body, *headers))
    return reader, writer


def _http_post(path: str, body: Any, *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content
