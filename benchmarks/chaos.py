"""Chaos: streaming clients of a real server whose engines are killed and suspended again and again.

    python benchmarks/chaos.py [--model smollm2] [--clients 200] [--seconds 180] [--kills 20] [--suspensions 4]
    python benchmarks/chaos.py [--replicas 2] [--drains 4] ...

Every client asks for one of a few requests, greedy or seeded, with n of 1 or 3, some of them continuing a KV state,
and compares each stream with the answer of an undisturbed engine. Kills strike a random engine at random moments,
also while it loads and while it is suspended. A drain takes one replica away for a second, while all others live. The
exit code is 1 if a request was lost, or if a token was wrong, missing or repeated.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from live_server import LiveServer, stream

KEY = "benchmark"
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "The three laws of robotics are",
    "1 2 3",
]
STATE_PROMPT = "User: How do I reverse a linked list?\nAssistant:"
# In a process of its own, since 200 streams keep this one busy.
SCALE = """
import sys, time, urllib.request
url, key, body = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
request = urllib.request.Request(f"{url}/v1/admin/models", body.encode(), headers)
begin = time.monotonic()
urllib.request.urlopen(request, timeout=60).read()
print(time.monotonic() - begin)
"""


@dataclass
class Report:
    """What the clients saw. Times in seconds."""

    streams: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    gaps_after_kill: list[float] = field(default_factory=list)
    gaps_after_suspension: list[float] = field(default_factory=list)
    longest_gap_otherwise: float = 0.0
    drains: list[float] = field(default_factory=list)  # durations, until the engine's process has ended


def requests(model: str, state: str, max_tokens: int) -> list[dict[str, Any]]:
    """The bodies that clients choose from; each has one right answer."""
    common = {"model": model, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    bodies = []
    for i, prompt in enumerate(PROMPTS):
        for n in (1, 3):
            bodies.append({**common, "prompt": prompt, "n": n, "temperature": 0})
            bodies.append({**common, "prompt": prompt, "n": n, "temperature": 0.8, "seed": 1000 + i})
    bodies.append({**common, "prompt": " And a doubly linked one?", "kv_cache_state": state, "temperature": 0})
    bodies.append({**common, "prompt": " In C?", "kv_cache_state": state, "temperature": 0.7, "seed": 5})
    return bodies


async def answer(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[int, str]:
    texts: dict[int, str] = {}
    async for index, text in stream(client, body):
        texts[index] = texts.get(index, "") + text
    return texts


class Chaos:
    """The clients, and what disturbs them."""

    def __init__(self, server: LiveServer, arguments: argparse.Namespace):
        self.server, self.arguments, self.report = server, arguments, Report()
        self.events: list[tuple[float, str]] = []  # time, "kill" or "suspension"
        self.random = random.Random(arguments.seed)

    async def run(self) -> Report:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=120, limits=limits) as client:
            first = {"prompt": STATE_PROMPT, "max_tokens": 40, "temperature": 0, "kv_cache_state": True}
            state = (await client.post("/v1/completions", json=first)).json()["kv_cache_state"]["id"]
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
            bodies = requests(model, state, self.arguments.max_tokens)
            expected = [await answer(client, body) for body in bodies]
            end = time.monotonic() + self.arguments.seconds
            clients = [self.client(client, bodies, expected, end, i) for i in range(self.arguments.clients)]
            await asyncio.gather(self.disturb(end), *clients)
        return self.report

    async def client(
        self, client: httpx.AsyncClient, bodies: list[Any], expected: list[Any], end: float, i: int
    ) -> None:
        choose = random.Random(f"{self.arguments.seed} {i}")
        while time.monotonic() < end:
            which = choose.randrange(len(bodies))
            texts: dict[int, str] = {}
            last = time.monotonic()
            self.report.streams += 1
            try:
                async for index, text in stream(client, bodies[which]):
                    now = time.monotonic()
                    if texts:
                        self.note_gap(last, now)
                    last = now
                    texts[index] = texts.get(index, "") + text
            except (RuntimeError, httpx.HTTPError) as error:
                self.report.lost.append(f"{type(error).__name__}: {error}")
                continue
            if texts != expected[which]:
                self.report.wrong.append(f"request {which}: {texts} instead of {expected[which]}")

    def note_gap(self, begin: float, end: float) -> None:
        # This process, with 200 streams, reads what was sent before an event up to a second after it.
        causes = {cause for at, cause in self.events if begin - 1 <= at <= end}
        if "suspension" in causes:
            self.report.gaps_after_suspension.append(end - begin)
        elif causes:
            self.report.gaps_after_kill.append(end - begin)
        else:
            self.report.longest_gap_otherwise = max(self.report.longest_gap_otherwise, end - begin)

    async def disturb(self, end: float) -> None:
        """Kill and suspend engines at random moments; some kills hit an engine that loads or is suspended."""
        kinds = ["kill"] * self.arguments.kills + ["suspension"] * self.arguments.suspensions
        kinds += ["drain"] * self.arguments.drains
        self.random.shuffle(kinds)
        pause = self.arguments.seconds / (len(kinds) + 1)
        double = False
        for kind in kinds:
            await asyncio.sleep(self.random.uniform(0.7, 1.1) * pause)
            if time.monotonic() > end:
                return
            if not (pids := self.server.engine_pids()):
                continue
            if kind == "drain":
                await self.drain(len(pids))
                continue
            pid = self.random.choice(pids)
            self.events.append((time.monotonic(), kind))
            if kind == "suspension":
                os.kill(pid, signal.SIGSTOP)
                continue
            double = not double
            if double and self.random.random() < 0.5:  # while it is suspended
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(self.random.uniform(0, 1))
            kill(pid)
            if not double:  # and its successor while it loads
                while not (successors := set(self.server.engine_pids()) - set(pids)):
                    await asyncio.sleep(0.005)
                await asyncio.sleep(self.random.uniform(0, 0.4))
                self.events.append((time.monotonic(), kind))
                kill(successors.pop())

    async def drain(self, replicas: int) -> None:
        """Take one replica away once all are ready, and start another one."""
        async with httpx.AsyncClient(base_url=self.server.url, timeout=60) as http:
            while not await self.ready_replicas(http) == replicas == self.arguments.replicas:
                await asyncio.sleep(0.05)
                replicas = len(self.server.engine_pids())
        self.report.drains.append(await asyncio.to_thread(self.scale, replicas - 1))
        await asyncio.sleep(1)
        await asyncio.to_thread(self.scale, replicas)

    def scale(self, replicas: int) -> float:
        """Change the number of replicas. Return how many seconds the server takes."""
        body = {"action": "scale", "name": self.arguments.model, "replicas": replicas}
        command = [sys.executable, "-c", SCALE, self.server.url, KEY, json.dumps(body)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    async def ready_replicas(self, http: httpx.AsyncClient) -> int:
        [model] = (await http.get("/stats")).json()["models"]
        return sum(replica["is_ready"] for replica in model["replicas"])


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--suspensions", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--drains", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="flags of octavo serve, after --")
    arguments = parser.parse_args()
    flags = ["--data-parallel-size", str(arguments.replicas), "--admin-key", KEY, *arguments.flags]
    with LiveServer(arguments.model, flags) as server:
        chaos = Chaos(server, arguments)
        report = asyncio.run(chaos.run())
    print(f"{report.streams} streams, {len(chaos.events)} kills and suspensions")
    print(f"lost: {len(report.lost)}, wrong: {len(report.wrong)}")
    print(f"longest gap after a kill {max(report.gaps_after_kill, default=0):.2f} s, ", end="")
    print(f"after a suspension {max(report.gaps_after_suspension, default=0):.2f} s, ", end="")
    print(f"otherwise {report.longest_gap_otherwise:.2f} s")
    if report.drains:
        median = statistics.median(report.drains)
        print(
            f"drains until the process has ended, over HTTP: median {median:.2f} s, longest {max(report.drains):.2f} s"
        )
    for line in (*report.lost[:5], *report.wrong[:5]):
        print(" ", line)
    return 1 if report.lost or report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
