"""Swap: streaming clients of a real server whose model is replaced by another one again and again.

    python benchmarks/swap.py MODEL_A MODEL_B [--clients 32] [--swaps 10] [--max-tokens 100]

Every client compares each stream with the answers of both models. Then a third name, which is loaded on demand, is
requested while it is unloaded. The exit code is 1 if a request failed, or if a stream was not the answer of one model.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from live_server import LiveServer, stream

KEY = "benchmark"
PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "1 2 3"]
PAUSE = 1.0  # seconds between two swaps


@dataclass
class Report:
    """What the clients saw. Times in seconds."""

    streams: int = 0
    failures: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    longest_gap: float = 0.0
    swaps: list[float] = field(default_factory=list)  # durations


class Clients:
    """Clients that request completions of the model "chat" until `stop`."""

    def __init__(self, http: httpx.AsyncClient, max_tokens: int):
        self.http, self.report = http, Report()
        self.is_over = False
        common = {"max_tokens": max_tokens, "ignore_eos": True, "stream": True, "temperature": 0}
        self.bodies: list[dict[str, Any]] = [{**common, "prompt": prompt} for prompt in PROMPTS]
        self.answers: list[set[str]] = [set() for _ in PROMPTS]

    async def learn(self, model: str) -> None:
        """Store a model's answers."""
        for body, answers in zip(self.bodies, self.answers, strict=True):
            answers.add("".join([text async for _, text in stream(self.http, {**body, "model": model})]))

    async def run(self, number: int) -> None:
        while not self.is_over:
            which = number = (number + 1) % len(PROMPTS)
            text, last = "", time.monotonic()
            self.report.streams += 1
            try:
                async for _, part in stream(self.http, {**self.bodies[which], "model": "chat"}):
                    now = time.monotonic()
                    self.report.longest_gap = max(self.report.longest_gap, now - last)
                    text, last = text + part, now
            except (RuntimeError, httpx.HTTPError) as error:
                self.report.failures.append(f"{type(error).__name__}: {error}")
                continue
            if text not in self.answers[which]:
                self.report.mixed.append(text)


async def change(http: httpx.AsyncClient, **body: Any) -> float:
    """Send a change of the models. Return its duration."""
    begin = time.monotonic()
    reply = await http.post("/v1/admin/models", json=body, headers={"Authorization": f"Bearer {KEY}"})
    if reply.status_code != 200:
        raise SystemExit(reply.text)
    return time.monotonic() - begin


async def run(server: LiveServer, arguments: argparse.Namespace) -> Report:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        clients = Clients(http, arguments.max_tokens)
        for model in ("chat", "other"):
            await clients.learn(model)
        running = [asyncio.ensure_future(clients.run(number)) for number in range(arguments.clients)]
        for turn in range(arguments.swaps):
            model = (arguments.b, arguments.a)[turn % 2]
            clients.report.swaps.append(await change(http, action="swap", name="chat", model=model))
            await asyncio.sleep(PAUSE)
        clients.is_over = True
        await asyncio.gather(*running)
        for _ in range(3):
            await change(http, action="unload", name="other")
            load = await change(http, action="load", name="other")
            await change(http, action="unload", name="other")
            begin = time.monotonic()
            async for _, _ in stream(http, {**clients.bodies[0], "model": "other"}):
                break
            print(
                f"on demand: first token {time.monotonic() - begin:.2f} s after the request; a load takes {load:.2f} s"
            )
    return clients.report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="MODEL_A")
    parser.add_argument("b", metavar="MODEL_B")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=100)
    arguments = parser.parse_args()
    models = {"chat": {"model": arguments.a}, "other": {"model": arguments.b, "load_on_demand": True}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "models.yaml"
        file.write_text(json.dumps({"models": models}))  # JSON is YAML
        with LiveServer(None, ["--models", str(file), "--admin-key", KEY]) as server:
            report = asyncio.run(run(server, arguments))
    print(f"{report.streams} streams, {len(report.swaps)} swaps of {max(report.swaps):.2f} s at most")
    print(f"failed: {len(report.failures)}, of neither model: {len(report.mixed)}")
    print(f"longest gap of a stream {report.longest_gap:.2f} s")
    for line in (*report.failures[:5], *report.mixed[:5]):
        print(" ", line)
    return 1 if report.failures or report.mixed else 0


if __name__ == "__main__":
    sys.exit(main())
