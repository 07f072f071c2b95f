"""Compare one frontend of several engines over TCP with as many servers that have an engine each.

    python benchmarks/many_engines.py [--model smollm2] [--engines 4] [--streams 16] [--step 0.05] [--seconds 8]

Each engine's steps are made to last as long as those of a larger model, by sleeping, so that engines do not compete for
the processors of this machine. What is compared is the tokens per second of all streams (`--streams` for each engine),
and the processor time that a token costs: in the servers, or in the frontend and in the processes that listen for it.
Rounds alternate.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from live_server import LiveServer, stream

PORT = 7400
TICKS = os.sysconf("SC_CLK_TCK")
SLOW_STEPS = """
import time, octavo.engine.engine as engine
step, seconds = engine.Engine.step, {seconds}
def slow(self):
    end = time.monotonic() + seconds
    outputs = step(self)
    if outputs:
        time.sleep(max(0, end - time.monotonic()))
    return outputs
engine.Engine.step = slow
"""


def cpu_seconds(pid: int) -> float:
    """The processor time that a process has taken, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextlib.contextmanager
def servers(arguments: argparse.Namespace, path: str) -> Iterator[tuple[list[str], list[int]]]:
    """Servers with an engine each: their addresses and processes."""
    flags = ["--access-log", "none", "--threads", "1"]
    with contextlib.ExitStack() as stack:
        every = [stack.enter_context(LiveServer(arguments.model, flags, path)) for _ in range(arguments.engines)]
        yield [server.url for server in every], [server.process.pid for server in every]


@contextlib.contextmanager
def frontend(arguments: argparse.Namespace, path: str) -> Iterator[tuple[list[str], list[int]]]:
    """A frontend of engines over TCP: its address, and all processes that do not compute."""
    engines = []
    code = "from octavo.entrypoints.command import main; main()"
    urls = [f"tcp://127.0.0.1:{PORT + i}" for i in range(arguments.engines)]
    secret = ["--secret-file", str(Path(path) / "secret")]
    for url in urls:
        command = [sys.executable, "-c", code, "engine", arguments.model, "--threads", "1", "--listen", url, *secret]
        environment = os.environ | {"PYTHONPATH": path}
        engines.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    try:
        with LiveServer(None, ["--engines", ",".join(urls), "--access-log", "none", *secret]) as server:
            while not are_ready(server.url, len(urls)):
                time.sleep(0.1)
            yield [server.url], [server.process.pid, *(engine.pid for engine in engines)]
    finally:
        for engine in engines:
            engine.terminate()
        for engine in engines:
            engine.wait(timeout=60)


def are_ready(url: str, count: int) -> bool:
    [model] = httpx.get(f"{url}/stats").json()["models"]
    return sum(replica["is_ready"] for replica in model.get("replicas", [])) == count


async def measure(urls: list[str], streams: int, seconds: float) -> float:
    """The tokens per second of so many streams, divided among the addresses."""
    tokens = 0
    ends = time.monotonic() + seconds

    async def client(http: httpx.AsyncClient, i: int) -> None:
        nonlocal tokens
        body: dict[str, Any] = {"prompt": f"Item {i}", "max_tokens": 400, "ignore_eos": True, "stream": True, "seed": i}
        while time.monotonic() < ends:
            with contextlib.suppress(RuntimeError, httpx.HTTPError):
                async for _ in stream(http, body):
                    tokens += 1
                    if time.monotonic() > ends:
                        return

    async with contextlib.AsyncExitStack() as stack:
        limits = httpx.Limits(max_connections=None)
        https = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60, limits=limits)) for url in urls
        ]
        await asyncio.gather(*(client(https[i % len(https)], i) for i in range(streams)))
    return tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--streams", type=int, default=16, help="for each engine")
    parser.add_argument("--step", type=float, default=0.05, help="seconds that a step takes at least")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as path, contextlib.ExitStack() as stack:
        (Path(path) / "sitecustomize.py").write_text(SLOW_STEPS.format(seconds=arguments.step))
        (Path(path) / "secret").write_text(os.urandom(32).hex())
        arms = {
            "single servers": stack.enter_context(servers(arguments, path)),
            "one frontend": stack.enter_context(frontend(arguments, path)),
        }
        rates: dict[str, list[float]] = {name: [] for name in arms}
        costs: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(arguments.rounds):
            for name, (urls, pids) in arms.items():
                before = sum(map(cpu_seconds, pids))
                rate = asyncio.run(measure(urls, arguments.streams * arguments.engines, arguments.seconds))
                rates[name].append(rate)
                costs[name].append((sum(map(cpu_seconds, pids)) - before) / (rate * arguments.seconds) * 1e6)
    for name in arms:
        rate, cost = statistics.median(rates[name]), statistics.median(costs[name])
        print(f"{name:<15} {rate:8.0f} tokens/s, {cost:5.0f} µs of processor time for each")
    print(f"ratio {statistics.median(rates['one frontend']) / statistics.median(rates['single servers']):.3f}")


if __name__ == "__main__":
    main()
