"""Hops: streams of a frontend whose engines, on machines of their own, are killed, suspended, cut off and drained.

    python benchmarks/hops.py [--model smollm2] [--engines 4] [--streams 100] [--disturbances 20] [--seed 0]

Each engine has a network namespace of its own, whose packets can be dropped, in one direction or both, or delayed by
200 ms (network_lines.py). That needs root. Each stream is compared with the answer of undisturbed engines. The exit
code is 1 if a request was lost, if a token was wrong, missing or repeated, or if a drained engine had requests after
two seconds.
"""

import argparse
import asyncio
import contextlib
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from chaos import STATE_PROMPT, answer, requests
from live_server import LiveServer, stream
from network_lines import Line, machines, missing

PORT = 7000
KINDS = ("kill", "suspend", "drop", "drop to it", "drop from it", "delay", "drain")
DRAIN_SECONDS = 2.0


class Engine:
    """`octavo engine` on a machine of its own, started again whenever it has ended."""

    def __init__(self, line: Line, flags: list[str], folder: Path):
        self.line, self._flags = line, flags
        self.log = (folder / f"{line.name}.log").open("a+")
        self.start()

    def start(self) -> None:
        code = "from octavo.entrypoints.command import main; main()"
        command = [sys.executable, "-c", code, "engine", *self._flags, "--listen", f"tcp://{self.line.address}:{PORT}"]
        self.process = subprocess.Popen(self.line.command(*command), stdout=self.log, stderr=self.log)

    def child(self) -> int | None:
        """The process that computes."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                return int(pid)
        return None

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read()

    async def ended(self) -> None:
        while self.process.poll() is None:
            await asyncio.sleep(0.01)


class Hops:
    """The clients, and what disturbs the engines."""

    def __init__(self, engines: list[Engine], arguments: argparse.Namespace):
        self.engines, self.arguments = engines, arguments
        self.random = random.Random(arguments.seed)
        self.disturbed: set[Engine] = set()
        self.done: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.streams = 0
        self.lost: list[str] = []
        self.wrong: list[str] = []
        self.longest_gap = self.gap_began = 0.0
        self.began = time.monotonic()
        self.ends = False

    async def run(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            await self.until_ready(http)
            first = {"prompt": STATE_PROMPT, "max_tokens": 40, "temperature": 0, "kv_cache_state": True}
            state = (await http.post("/v1/completions", json=first)).json()["kv_cache_state"]["id"]
            model = (await http.get("/v1/models")).json()["data"][0]["id"]
            bodies = requests(model, state, self.arguments.max_tokens)
            expected = [await answer(http, body) for body in bodies]
            clients = [self.client(http, bodies, expected, i) for i in range(self.arguments.streams)]
            await asyncio.gather(self.disturb(http), *clients)

    async def until_ready(self, http: httpx.AsyncClient) -> None:
        """Until all engines are."""
        while await self.ready(http) < len(self.engines):
            await asyncio.sleep(0.1)

    async def ready(self, http: httpx.AsyncClient) -> int:
        [model] = (await http.get("/stats")).json()["models"]
        return sum(replica["is_ready"] for replica in model.get("replicas", []))

    async def client(self, http: httpx.AsyncClient, bodies: list[Any], expected: list[Any], i: int) -> None:
        choose = random.Random(f"{self.arguments.seed} {i}")
        while not self.ends:
            which = choose.randrange(len(bodies))
            texts: dict[int, str] = {}
            last = time.monotonic()
            self.streams += 1
            try:
                async for index, text in stream(http, bodies[which]):
                    now = time.monotonic()
                    if now - last > self.longest_gap:
                        self.longest_gap, self.gap_began = now - last, last - self.began
                    last = now
                    texts[index] = texts.get(index, "") + text
            except (RuntimeError, httpx.HTTPError) as error:
                self.lost.append(f"{type(error).__name__}: {error}")
                continue
            if texts != expected[which]:
                self.wrong.append(f"request {which}: {texts} instead of {expected[which]}")

    async def disturb(self, http: httpx.AsyncClient) -> None:
        """Disturb engines one after the other, and sometimes two at once."""
        kinds = [KINDS[i % len(KINDS)] for i in range(self.arguments.disturbances)]
        self.random.shuffle(kinds)
        running: set[asyncio.Task[None]] = set()
        for kind in kinds:
            while len(running) > self.random.randrange(2) or len(self.disturbed) >= len(self.engines) - 1:
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            engine = self.random.choice([engine for engine in self.engines if engine not in self.disturbed])
            running.add(asyncio.create_task(self.disturb_one(http, engine, kind)))
            await asyncio.sleep(self.random.uniform(0.2, 1.5))
        for task in running:
            await task
        await self.until_ready(http)
        self.ends = True

    async def disturb_one(self, http: httpx.AsyncClient, engine: Engine, kind: str) -> None:
        if self.arguments.verbose:
            print(f"{time.monotonic() - self.began:.1f} s: {kind} {engine.line.address}", file=sys.stderr)
        self.disturbed.add(engine)
        self.done[kind] += 1
        line, pause = engine.line, self.random.uniform(0.5, 5)
        match kind:
            case "kill":
                engine.process.send_signal(signal.SIGKILL)
            case "drain":
                engine.process.send_signal(signal.SIGTERM)
            case "suspend":
                pid = self.random.choice([engine.process.pid, engine.child() or engine.process.pid])
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(pause)
                with contextlib.suppress(ProcessLookupError):  # it was replaced meanwhile
                    os.kill(pid, signal.SIGCONT)
            case "delay":
                line.delay(0.2)
            case "drop":
                line.cut()
            case "drop to it":
                line.cut(up=False)
            case "drop from it":
                line.cut(down=False)
        if kind in ("kill", "drain"):
            await engine.ended()
            engine.start()
        elif kind != "suspend":
            await asyncio.sleep(pause)
            line.mend()
        while not await self.all_serve(http):
            await asyncio.sleep(0.1)
        self.disturbed.discard(engine)

    async def all_serve(self, http: httpx.AsyncClient) -> bool:
        return await self.ready(http) >= len(self.engines) - len(self.disturbed) + 1


def drains(engines: list[Engine]) -> list[tuple[int, float]]:
    """The requests that each drained engine had left, and after how many seconds."""
    found = [re.findall(r"drained: it has (\d+) requests after ([\d.]+) s", engine.text()) for engine in engines]
    return [(int(left), float(seconds)) for each in found for left, seconds in each]


def run(center: Line, lines: list[Line], arguments: argparse.Namespace) -> int:
    center.enter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "secret").write_text(secrets.token_hex(32))
        shared = ["--secret-file", str(folder / "secret")]
        flags = [arguments.model, "--threads", "1", "--served-model-name", "model", *shared]
        engines = [Engine(line, flags, folder) for line in lines]
        try:
            urls = ",".join(f"tcp://{line.address}:{PORT}" for line in lines)
            with LiveServer(None, ["--engines", urls, *shared]) as server:
                hops = Hops(engines, arguments)
                asyncio.run(hops.run(server.url))
        finally:
            emptied = drains(engines)
            for engine in engines:
                engine.process.kill()
                engine.process.wait()
    print(f"{hops.streams} streams; {', '.join(f'{kind}: {count}' for kind, count in hops.done.items())}")
    print(f"lost: {len(hops.lost)}, wrong: {len(hops.wrong)}")
    print(f"longest gap between two pieces of a stream: {hops.longest_gap:.2f} s, from {hops.gap_began:.1f} s on")
    if emptied:
        print(f"drained engines were empty after {max(seconds for _, seconds in emptied):.2f} s at most")
    for text in (*hops.lost[:5], *hops.wrong[:5]):
        print(" ", text)
    slow = any(left or seconds > DRAIN_SECONDS for left, seconds in emptied)
    return 1 if hops.lost or hops.wrong or slow else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--disturbances", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print each disturbance")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"this machine cannot have such networks: {reason}", file=sys.stderr)
        return 2
    codes: list[int] = []
    with machines(arguments.engines) as (center, lines):
        thread = threading.Thread(target=lambda: codes.append(run(center, lines, arguments)))
        thread.start()
        thread.join()
    return codes[0] if codes else 1


if __name__ == "__main__":
    sys.exit(main())
