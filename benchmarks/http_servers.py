"""Compare HTTP servers under the same ASGI application: processor time per streamed token, and conformance.

    python benchmarks/http_servers.py MODEL octavo uvicorn-httptools uvicorn-h11 hypercorn granian

Each candidate serves MODEL in a process of its own; 64 clients in this process stream completions. What is measured is
the processor time (user and system) of the server process alone: not the engine's, not the clients'. `octavo` is
`octavo serve`; the others run the same application behind another server. `NAME=PYTHON` runs a candidate with another
interpreter, such as that of an older checkout; names that begin with "octavo" run `octavo serve`. Rounds alternate
between the candidates.

The checks are those of HTTP that clients in the field depend on: see `CHECKS`.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TOKENS = 400
BODY = {"prompt": "The module", "max_tokens": TOKENS, "ignore_eos": True, "stream": True, "temperature": 0}
SHORT = json.dumps(BODY | {"max_tokens": 4}).encode()
TICKS = os.sysconf("SC_CLK_TCK")


def serve(name: str, model: str, port: int) -> None:
    """Serve the application of this interpreter's octavo behind the server `name`."""
    import uvloop

    from octavo import AsyncLLM
    from octavo.fleet.fleet import Fleet
    from octavo.server.app import create_app

    async def main() -> None:
        async with AsyncLLM(model, served_model_name="tiny") as llm:
            app = create_app(Fleet.of(llm))
            if name.startswith("uvicorn-"):
                import uvicorn

                config = uvicorn.Config(
                    app, port=port, http=name.removeprefix("uvicorn-"), ws="none", lifespan="off", log_level="error",
                    access_log=False, proxy_headers=False, server_header=False,
                )  # fmt: skip
                await uvicorn.Server(config).serve()
            elif name == "hypercorn":
                import hypercorn.asyncio
                import hypercorn.config

                settings = hypercorn.config.Config()
                settings.bind = [f"127.0.0.1:{port}"]
                await hypercorn.asyncio.serve(app, settings)
            elif name == "granian":
                from granian.constants import Interfaces
                from granian.server.embed import Server

                await Server(app, port=port, interface=Interfaces.ASGINL).serve()

    uvloop.run(main())


class Candidate:
    """A server process that has answered a request."""

    def __init__(self, name: str, model: str):
        self.name, _, python = name.partition("=")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        python = python or sys.executable
        command = [python, "-m", "octavo.entrypoints.openai.api_server", "--model", model, "--port", str(self.port)]
        if not self.name.startswith("octavo"):
            command = [python, __file__, "--serve", self.name, "--port", str(self.port), model]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not self.exchange(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start")
            time.sleep(0.1)

    def exchange(self, sent: bytes, half_close: bool = False, timeout: float = 5.0) -> bytes:
        """All that comes back within `timeout` seconds for these bytes; b"" if nothing does."""
        received = b""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout) as connection:
            connection.sendall(sent)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                received += part
        return received

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()


async def stream(port: int) -> int:
    """The number of events of one streamed completion."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_post(json.dumps(BODY).encode(), "Connection: close"))
    events = (await reader.read(-1)).count(b"data: {")
    writer.close()
    return events


def microseconds_per_token(candidate: Candidate, clients: int) -> float:
    async def main() -> list[int]:
        return await asyncio.gather(*(stream(candidate.port) for _ in range(clients)))

    before = candidate.cpu_seconds()
    asyncio.run(main())
    return (candidate.cpu_seconds() - before) * 1e6 / (clients * TOKENS)


def _post(body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST /v1/completions HTTP/{version}", "Host: localhost", "Content-Type: application/json",
             f"Content-Length: {len(body)}", *headers]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def slow_header_ends(candidate: Candidate) -> bool:
    """A connection that sends the start of a header and then nothing is closed within 40 s."""
    start = time.monotonic()
    candidate.exchange(b"GET /health HTTP/1.1\r\nHos", timeout=40)
    return time.monotonic() - start < 39


def long_header_is_431(candidate: Candidate) -> bool:
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 2_000_000 + b"\r\nConnection: close\r\n\r\n"
    return b" 431 " in candidate.exchange(head).partition(b"\r\n")[0]


def upgrade_to_h2c_is_ignored(candidate: Candidate) -> bool:
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    return b" 200 " in candidate.exchange(_post(SHORT, *upgrade), timeout=2).partition(b"\r\n")[0]


def http_1_0_is_not_chunked(candidate: Candidate) -> bool:
    reply = candidate.exchange(_post(SHORT, version="1.0")).lower()
    return b"[done]" in reply and b"chunked" not in reply


def half_close_is_answered(candidate: Candidate) -> bool:
    return b"[DONE]" in candidate.exchange(_post(SHORT, "Connection: close"), half_close=True)


CHECKS: dict[str, Callable[[Candidate], bool]] = {
    "C1 slow header ends": slow_header_ends,
    "C2 long header": long_header_is_431,
    "C3 h2c": upgrade_to_h2c_is_ignored,
    "C4 HTTP/1.0": http_1_0_is_not_chunked,
    "C5 half-close": half_close_is_answered,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("candidates", nargs="*")
    parser.add_argument("--serve")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--no-checks", action="store_true")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.model, arguments.port)
        return
    figures: dict[str, list[float]] = {name: [] for name in arguments.candidates}
    for _ in range(arguments.rounds):
        for name in arguments.candidates:
            candidate = Candidate(name, arguments.model)
            microseconds_per_token(candidate, 8)
            figures[name].append(microseconds_per_token(candidate, arguments.clients))
            candidate.stop()
    for name in arguments.candidates:
        passed = {}
        if not arguments.no_checks:
            candidate = Candidate(name, arguments.model)
            passed = {title: "pass" if check(candidate) else "fail" for title, check in CHECKS.items()}
            candidate.stop()
        rounds = " ".join(f"{figure:.1f}" for figure in figures[name])
        median = statistics.median(figures[name])
        print(f"{name.partition('=')[0]}: median {median:.1f} µs per token ({rounds}) {passed}")


if __name__ == "__main__":
    main()
