"""Wrong API keys: what a flood of them costs a client with a right one, and the server's memory.

    python benchmarks/wrong_keys.py [--model smollm2] [--rate 10000] [--connections 64] [--seconds 10]

A process of its own sends wrong keys over all connections, at the given rate if the server keeps up. Meanwhile a client
with a right key completes short prompts, one after the other. Printed: the rate of refusals that was reached, the
client's latencies before and during the flood, and the memory of the server before and after it. The exit code is 1 if
an answer was anything but a refusal, or if memory grew by more than 16 MiB.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import httpx
import numpy as np
import uvloop
from live_server import LiveServer

from octavo.tenants.key_file import add_key

BODY = {"prompt": "The module", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
TICK = 0.001  # seconds between two bursts of wrong keys
MAX_GROWTH = 16 << 20


@dataclass
class Counts:
    """What all connections have sent and received."""

    sent: int = 0
    refused: int = 0
    others: int = 0


class Flood(asyncio.Protocol):
    """A connection that sends wrong keys, each after the answer to the one before."""

    def __init__(self, counts: Counts):
        self._counts, self._waits = counts, False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def send(self) -> None:
        """Send a key that was not sent before, unless the answer to the last one is missing."""
        if self._waits:
            return
        self._waits, self._counts.sent = True, self._counts.sent + 1
        key = b"Authorization: Bearer sk-%043d\r\n" % self._counts.sent
        self._transport.write(HEAD + key + b"Content-Length: 2\r\n\r\n{}")

    def data_received(self, data: bytes) -> None:
        self._waits = False
        if data.startswith(b"HTTP/1.1 401 "):
            self._counts.refused += 1
        else:
            self._counts.others += 1


async def _flood(address: tuple[str, int], rate: float, connections: int, seconds: float) -> Counts:
    loop, counts = asyncio.get_running_loop(), Counts()
    protocols = [(await loop.create_connection(lambda: Flood(counts), *address))[1] for _ in range(connections)]
    began, turn = time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        for _ in range(min(round(passed * rate) - counts.sent, connections)):
            protocols[turn % connections].send()
            turn += 1
        await asyncio.sleep(TICK)
    return counts


def flood(address: tuple[str, int], rate: float, connections: int, seconds: float) -> Counts:
    """Send wrong keys for some seconds."""
    return uvloop.run(_flood(address, rate, connections, seconds))


def latencies(client: httpx.Client, seconds: float) -> np.ndarray:
    """Return the milliseconds of each completion of a client that sends one after the other."""
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        client.post("/v1/completions", json=BODY).raise_for_status()
        found.append(1e3 * (time.perf_counter() - began))
    return np.array(found)


def attack(server: LiveServer, key: str, arguments: argparse.Namespace) -> bool:
    load = (server.address, arguments.rate, arguments.connections, arguments.seconds)
    with (
        httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client,
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        pool.submit(flood, server.address, 100, 2, 1).result()  # so that what is allocated once is there
        calm, before = latencies(client, arguments.seconds / 2), server.memory()
        flooding = pool.submit(flood, *load)
        during = latencies(client, arguments.seconds)
        counts = flooding.result()
    growth = server.memory() - before
    print(f"refusals: {counts.refused / arguments.seconds:,.0f} a second, {counts.others} other answers")
    for name, found in (("before", calm), ("during", during)):
        middle, high = np.percentile(found, [50, 95])
        print(f"a client with a key, {name}: median {middle:.1f} ms, 95 % {high:.1f} ms, most {found.max():.1f} ms")
    print(f"memory: {before / 2**20:.0f} MiB, {growth / 2**20:+.1f} MiB after the flood")
    return counts.others == 0 and growth < MAX_GROWTH


def main() -> None:
    parser = argparse.ArgumentParser(description="Flood a server with wrong API keys.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rate", type=float, default=10_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.yaml"
        key = add_key(keys, name="client")
        with LiveServer(arguments.model, ["--keys", str(keys)]) as server:
            is_well = attack(server, key, arguments)
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
