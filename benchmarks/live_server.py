"""A real server for benchmarks that attack one, and streams from it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx


class LiveServer:
    """`octavo serve` on a free port, from when it is ready until the end of the `with` block.

    Args:
        model: None if the flags name it.
        flags: of octavo serve.
        pythonpath: where the engine finds a policy.
    """

    def __init__(self, model: str | None, flags: Sequence[str] = (), pythonpath: str = ""):
        module = ["-m", "octavo.entrypoints.openai.api_server"]
        environment = os.environ | ({"PYTHONPATH": pythonpath} if pythonpath else {})
        self.process = subprocess.Popen(
            [sys.executable, *module, *(["--model", model] if model else []), "--port", "0", *flags],
            stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.search(r"https?://[\w.]+:\d+", line):
                self.url = match[0]
            if line.startswith("curl"):
                break
        else:
            raise SystemExit("the server did not start")
        # Nobody reads the access log; a full pipe must not stop the server.
        subprocess.Popen(["cat"], stdin=self.process.stdout, stdout=subprocess.DEVNULL)

    def __enter__(self) -> "LiveServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=90)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def engine_pid(self) -> int | None:
        """Return the pid of an engine; None while there is none."""
        return next(iter(self.engine_pids()), None)

    def engine_pids(self) -> list[int]:
        """Return the pids of all engines."""
        pids = []
        for child in self._children():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if b"engine_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    pids.append(child)
        return pids

    def memory(self) -> int:
        """Return the resident bytes of the server and its children; what they share is counted once."""
        return sum(self._proportional(pid) for pid in (self.process.pid, *self._children()))

    def descriptors(self) -> int:
        """Return the number of open file descriptors of the server, without those of its children."""
        return open_files(self.process.pid)

    def cpu_seconds(self) -> float:
        """Return the processor time that the server has taken, without its children."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _children(self) -> Iterator[int]:
        pid = self.process.pid
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                yield from map(int, (thread / "children").read_text().split())

    @staticmethod
    def _proportional(pid: int) -> int:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
        return 0


def open_files(pid: int) -> int:
    """Return the number of open file descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[tuple[int, str]]:
    """Yield (index, text) of each event of a streamed completion.

    Raises RuntimeError for an error or an early end.
    """
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread()).decode()[:200]}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return
            if not line.startswith("data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"error event: {event['error']['message']}")
            for choice in event["choices"]:
                yield choice["index"], choice["text"]
    raise RuntimeError("the stream ended early")
