"""A day in small: short requests by the hundred thousand, with keys, metrics, trace and access log on.

    python benchmarks/day.py [--requests 200000] [--clients 32] [--model DIR] [flags of octavo serve, after --]

Completions and chats, streamed and whole, with and without a shared prefix, of ten keys; one in 16 hangs up while it
streams, one in 16 has a wrong key, and one in 16 is invalid. After every fiftieth of them the clients pause until the
server is idle, and a line is printed: what the server and its engine hold. The exit code is 1 if any of it has grown
after the first tenth, if pages are in use or requests live while the server is idle, or if a request was not answered
as it should be.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from live_server import LiveServer, open_files

from octavo.states.book import MAX_REMEMBERED, MIN_REMEMBERED
from octavo.tenants.key_file import add_key

ADMIN = "sk-admin"
KEYS = 10
PARTS = 50  # of the run; after each, a sample
WARM = 0.1  # share of the run after which nothing may grow
REMEMBERED = (
    MAX_REMEMBERED // MIN_REMEMBERED
)  # requests after which memory may not grow, as KV states are made of these
MEMORY_GROWTH = 8 * 2**20  # bytes of each process from then to the end that count as flat
PREFIX = "You are a helpful assistant who answers in a few words. " * 8


@dataclass(frozen=True)
class Sample:
    """What an idle server holds after a number of requests. Memory in bytes; `in_use` and `live` must be 0.

    Attributes:
        series: lines of /metrics.
        in_use: KV pages of running sequences.
        live: completions that the frontend knows of.
    """

    requests: int
    server_memory: int
    engine_memory: int
    server_files: int
    engine_files: int
    server_threads: int
    engine_threads: int
    series: int
    cached_pages: int
    in_use: int
    live: int


COUNTS = ("server_files", "engine_files", "server_threads", "engine_threads", "series")  # that must not grow
MEMORY = ("server_memory", "engine_memory")


async def request(client: httpx.AsyncClient, number: int, secrets: Sequence[str]) -> tuple[str, bool]:
    """Send request `number`. Return its kind, and whether it was answered as it should be."""
    secret, kind = secrets[number % len(secrets)], number % 16
    headers = {"Authorization": f"Bearer {secret if kind != 14 else f'sk-wrong-{number}'}"}
    prompt = f"{PREFIX if number % 4 == 0 else ''}Question {number}: what is {number} + {number % 97}?"
    body: dict[str, Any] = {"max_tokens": 4 + number % 5, "ignore_eos": True, "seed": number, "stream": kind % 2 == 1}
    path = "/v1/completions"
    if number % 3:
        body["prompt"] = prompt
    else:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": prompt}]
    if kind == 14:
        return "wrong key", (await client.post(path, json=body, headers=headers)).status_code == 401
    if kind == 15:
        invalid = {**body, "temperature": -1}
        return "invalid", (await client.post(path, json=invalid, headers=headers)).status_code == 400
    if kind == 13:
        async with client.stream("POST", path, json={**body, "max_tokens": 200}, headers=headers) as response:
            async for _ in response.aiter_bytes():
                break
            return "hangs up", response.status_code == 200
    response = await client.post(path, json=body, headers=headers)
    whole = response.text.rstrip().endswith("[DONE]") if body["stream"] else "usage" in response.json()
    return "streamed" if body["stream"] else "whole", response.status_code == 200 and whole


async def some(url: str, numbers: Sequence[int], clients: int, secrets: Sequence[str]) -> Counter[tuple[str, bool]]:
    """Send these requests, as many at a time as there are clients."""
    outcomes: Counter[tuple[str, bool]] = Counter()
    waiting = iter(numbers)

    async def work() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120, verify=False) as client:
            for number in waiting:
                outcomes[await request(client, number, secrets)] += 1

    await asyncio.gather(*(work() for _ in range(clients)))
    return outcomes


async def sample(server: LiveServer, requests: int) -> Sample:
    """Wait until the server is idle, and return what it holds."""
    headers = {"Authorization": f"Bearer {ADMIN}"}
    async with httpx.AsyncClient(base_url=server.url, timeout=30, headers=headers) as client:
        for _ in range(300):
            [model] = (await client.get("/stats")).json()["models"]
            if not model["frontend"]["live"] and not model["engine"]["running"]:
                break
            await asyncio.sleep(0.1)
        series = len((await client.get("/metrics")).text.splitlines())
        engine = model["engine"]
        [pid] = server.engine_pids()
        return Sample(
            requests=requests,
            server_memory=status(server.process.pid, "VmRSS") * 1024,
            engine_memory=status(pid, "VmRSS") * 1024,
            server_files=server.descriptors(),
            engine_files=open_files(pid),
            server_threads=status(server.process.pid, "Threads"),
            engine_threads=status(pid, "Threads"),
            series=series,
            cached_pages=engine["cached_pages"],
            in_use=engine["num_pages"] - engine["free_pages"] - engine["cached_pages"] - engine["num_pinned"],
            live=model["frontend"]["live"],
        )


def status(pid: int, name: str) -> int:
    """Return a number in /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def growth(samples: Sequence[Sample], name: str) -> float:
    """Return by how much a figure has grown from the first sample to the last, on the line that fits them best."""
    requests = np.array([each.requests for each in samples], float)
    slope = np.polyfit(requests, [getattr(each, name) for each in samples], 1)[0]
    return float(slope * (requests[-1] - requests[0]))


def complaints(samples: Sequence[Sample]) -> list[str]:
    """Return what is not flat after the first tenth of the run."""
    later = [each for each in samples if each.requests >= WARM * samples[-1].requests]
    found = [f"{name} is {getattr(each, name)} after {each.requests:,} requests, while the server is idle"
             for each in samples for name in ("in_use", "live") if getattr(each, name)]  # fmt: skip
    for name in COUNTS:
        first, last = getattr(later[0], name), max(getattr(each, name) for each in later[-3:])
        if last > first:
            found.append(f"{name} has grown from {first:,} to {last:,}")
    later = [each for each in later if each.requests >= REMEMBERED]
    if len(later) < 3:
        print(f"memory is not judged: the server remembers the latest {REMEMBERED:,} requests, and so grows until then")
        return found
    for name in MEMORY:
        grown = growth(later, name)
        per_request = grown / (later[-1].requests - later[0].requests)
        print(
            f"{name}: {grown / 2**20:+.1f} MiB after {later[0].requests:,} requests, {per_request:+.0f} bytes a request"
        )
        if grown > MEMORY_GROWTH:
            found.append(f"{name} has grown by {grown / 2**20:.1f} MiB")
    return found


def line(each: Sample) -> str:
    """Return a sample as a line of the table."""
    cells = (getattr(each, field.name) for field in fields(Sample))
    return "  ".join(
        f"{cell / 2**20 if field.name in MEMORY else cell:>{len(field.name)},.{int(field.name in MEMORY)}f}"
        for cell, field in zip(cells, fields(Sample), strict=True)
    )


async def run(server: LiveServer, arguments: argparse.Namespace, secrets: Sequence[str]) -> list[str]:
    """Send all requests. Return what was wrong."""
    print("  ".join(field.name for field in fields(Sample)), "  (memory in MiB)", flush=True)
    samples: list[Sample] = []
    outcomes: Counter[tuple[str, bool]] = Counter()
    began = time.monotonic()
    for end in (round(arguments.requests * part / PARTS) for part in count(1)):
        begin = samples[-1].requests if samples else 0
        outcomes += await some(server.url, range(begin, end), arguments.clients, secrets)
        samples.append(await sample(server, end))
        print(line(samples[-1]), flush=True)
        if end >= arguments.requests:
            break
    print(f"{time.monotonic() - began:,.0f} s: {', '.join(f'{n:,} {kind}' for (kind, _), n in outcomes.items())}")
    wrong = [
        f"{n:,} of kind {kind!r} were not answered as they should be" for (kind, ok), n in outcomes.items() if not ok
    ]
    return wrong + complaints(samples)


def tiny_model(folder: Path) -> str:
    """Write a tiny random model and return its path."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
    from tiny_models import save_tiny_model

    return str(save_tiny_model("llama", folder / "model"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--model", help="by default a tiny random one")
    parser.add_argument("flags", nargs="*", help="of octavo serve, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = folder / "keys.yaml"
        secrets = [add_key(keys, name=f"key-{number}", tenant=f"team-{number % 3}") for number in range(KEYS)]
        flags = ["--keys", str(keys), "--admin-key", ADMIN, "--enable-metrics", "--trace", str(folder / "trace")]
        flags += ["--access-log", "json", "--kv-cache-memory", "8MiB", *arguments.flags]
        with LiveServer(arguments.model or tiny_model(folder), flags) as server:
            wrong = asyncio.run(run(server, arguments, secrets))
        print(f"trace: {(folder / 'trace').stat().st_size / 2**20:,.1f} MiB")
    print("\n".join(wrong) or "flat")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
