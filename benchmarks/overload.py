"""Overload: ten times as many requests as the server can serve, beside idle and slow connections.

    python benchmarks/overload.py [--model smollm2] [--seconds 120] [--factor 10] [flags of octavo serve, after --]

First the peak: as many clients as max_batch_size, each asking again as soon as it is answered. Then requests arrive at
`factor` times that rate, whether or not earlier ones are answered, while another process holds `idle` connections that
say nothing and `slow` ones that send a byte per second, half of them in a header, half in a body. Then the peak once
more. The queue is short and the KV pool small, so that both are full from the beginning. With `-- --threads 1` on two
cores, the engine has a core of its own, as if the clients ran elsewhere.

Printed: the throughput of what was admitted as a share of the peak, how long refusals took, memory and open file
descriptors during and after, and the processors' time that each side took of the engine. Lost: requests that were
neither answered whole nor refused.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass, field

import uvloop
from live_server import LiveServer

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@dataclass
class Tally:
    """What clients saw. Times in seconds."""

    tokens: int = 0
    answered: int = 0
    refused: list[float] = field(default_factory=list)  # time to each refusal
    lost: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)


class Load:
    """Requests of one size to one server, counted in `tally`, which may be exchanged."""

    def __init__(self, server: LiveServer, max_tokens: int):
        self.server, self.tally, self._max_tokens = server, Tally(), max_tokens
        self._number = 0

    async def request(self) -> None:
        """Stream one completion over a connection of its own."""
        self._number += 1
        body = {"prompt": f"Request {self._number}:", "max_tokens": self._max_tokens, "ignore_eos": True}
        content = json.dumps(body | {"stream": True, "seed": 1}).encode()
        start, tokens, is_done, status = time.monotonic(), 0, False, b""
        try:
            reader, writer = await asyncio.open_connection(*self.server.address)
            writer.write(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
            status = (await reader.readline()).split()[1]
            if status == b"503":
                self.tally.refused.append(time.monotonic() - start)
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    tokens += 1
                    self.tally.tokens += 1
                is_done = is_done or line.startswith(b"data: [DONE]")
            writer.close()
        except (OSError, IndexError) as error:
            self.tally.lost.append(f"{type(error).__name__}: {error}")
            return
        self.tally.answered += is_done
        if status == b"200" and not is_done:
            self.tally.lost.append(f"ended after {tokens} tokens")
        elif status not in (b"200", b"503"):
            self.tally.lost.append(f"status {status.decode()}")

    async def peak(self, clients: int, seconds: float) -> float:
        """Return the tokens per second when `clients` ask again and again."""

        async def ask() -> None:
            while time.monotonic() < end:
                await self.request()

        self.tally = Tally()
        end = time.monotonic() + seconds + 5
        asking = [asyncio.ensure_future(ask()) for _ in range(clients)]
        await asyncio.sleep(5)  # until they are out of step with each other
        before, start = self.tally.tokens, time.monotonic()
        await asyncio.sleep(seconds)
        rate = (self.tally.tokens - before) / (time.monotonic() - start)
        await asyncio.wait(asking)
        return rate

    async def flood(self, rate: float, seconds: float) -> float:
        """Send `rate` requests per second; return the tokens per second of those that were admitted."""
        self.tally = Tally()
        pending: set[asyncio.Task[None]] = set()
        start = time.monotonic()
        sent, tokens_then, then = 0, 0, start
        while (now := time.monotonic()) < start + seconds:
            while sent < (now - start) * rate:
                task = asyncio.ensure_future(self.request())
                pending.add(task)
                task.add_done_callback(pending.discard)
                sent += 1
            if then == start and now > start + 5:
                tokens_then, then = self.tally.tokens, now
            if len(self.tally.memory) < now - start:
                self.tally.memory.append(await asyncio.to_thread(self.server.memory))
                self.tally.descriptors.append(self.server.descriptors())
            await asyncio.sleep(0.01)
        throughput = (self.tally.tokens - tokens_then) / (time.monotonic() - then)
        print(f"sent {sent}; waiting for {len(pending)} that were admitted", flush=True)
        if pending:
            await asyncio.wait(pending)
        return throughput


async def hang(address: tuple[str, int], num_idle: int, num_slow: int) -> None:
    """Open connections within half a minute, and again when the server closes them, until this process is ended."""
    heads = (b"GET /health HTTP/1.1\r\nX-Slow: ", HEAD + b"Content-Length: 100000\r\n\r\n")
    slow = [trickle(address, heads[i % 2], 30 * i / num_slow) for i in range(num_slow)]
    await asyncio.gather(*slow, *(idle(address, 30 * i / num_idle) for i in range(num_idle)))


async def trickle(address: tuple[str, int], head: bytes, wait: float) -> None:
    """Keep a connection that sends one byte per second, from `wait` seconds on."""
    await asyncio.sleep(wait)
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(head)
            closed = asyncio.ensure_future(reader.read())
            try:
                while not closed.done():
                    await asyncio.wait((closed,), timeout=1.0)
                    writer.write(b"x")
            finally:
                closed.cancel()
                writer.close()


async def idle(address: tuple[str, int], wait: float) -> None:
    """Keep a connection that says nothing, from `wait` seconds on."""
    await asyncio.sleep(wait)
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(*address)
            try:
                await reader.read()
            finally:
                writer.close()


async def attack(server: LiveServer, arguments: argparse.Namespace) -> None:
    load = Load(server, arguments.max_tokens)
    await load.peak(arguments.clients, 5)  # the first touch of memory
    peak = await load.peak(arguments.clients, arguments.seconds / 4)
    rate = arguments.factor * peak / arguments.max_tokens
    print(f"peak: {peak:.0f} tok/s, {peak / arguments.max_tokens:.1f} requests/s", flush=True)
    memory, descriptors = server.memory(), server.descriptors()
    hanging = multiprocessing.get_context("spawn").Process(
        target=hang_until_ended, args=(server.address, arguments.idle, arguments.slow), daemon=True
    )
    hanging.start()
    await asyncio.sleep(arguments.warm_up)
    seconds, clients = server.cpu_seconds(), time.process_time()
    throughput = await load.flood(rate, arguments.seconds)
    seconds, clients = server.cpu_seconds() - seconds, time.process_time() - clients
    tally = load.tally
    hanging.kill()
    hanging.join()
    again = await load.peak(arguments.clients, arguments.seconds / 4)
    usual = (peak + again) / 2
    print(f"at {arguments.factor:g} times its rate {throughput:.0f} tok/s; peak afterwards {again:.0f}", end="")
    print(f"; {throughput / usual:.1%} of the mean of both peaks")
    print(f"processor time: server {seconds / arguments.seconds:.1%}, clients {clients / arguments.seconds:.1%} of one")
    print(f"answered {tally.answered}, refused {len(tally.refused)}, lost {len(tally.lost)} {tally.lost[:3]}")
    if tally.refused:
        slowest, middle = max(tally.refused), statistics.median(tally.refused)
        p99 = statistics.quantiles(tally.refused, n=100)[98] if len(tally.refused) > 1 else slowest
        print(f"refusals: median {middle * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, slowest {slowest * 1e3:.1f} ms")
    early, late = tally.memory[len(tally.memory) // 4], tally.memory[-1]
    print(
        f"memory: before {memory / 1e6:.0f} MB, after a quarter {early / 1e6:.0f} MB, at the end {late / 1e6:.0f} MB,",
        end="",
    )
    print(f" afterwards {server.memory() / 1e6:.0f} MB")
    print(f"descriptors: before {descriptors}, at most {max(tally.descriptors)}, afterwards {server.descriptors()}")


def hang_until_ended(address: tuple[str, int], num_idle: int, num_slow: int) -> None:
    """Run `hang`: the main function of another process."""
    uvloop.run(hang(address, num_idle, num_slow))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--warm-up", type=float, default=35.0, help="seconds for idle and slow connections to come")
    parser.add_argument("--idle", type=int, default=2000)
    parser.add_argument("--slow", type=int, default=200)
    parser.add_argument("flags", nargs="*", help="flags of octavo serve, after --")
    arguments = parser.parse_args()
    needed = 2 * (arguments.idle + arguments.slow) + 4000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(needed, hard)), hard))
    limits = ["--max-batch-size", str(arguments.clients), "--max-queue", str(arguments.clients)]
    with LiveServer(arguments.model, [*limits, "--kv-cache-memory", "256MiB", *arguments.flags]) as server:
        uvloop.run(attack(server, arguments))


if __name__ == "__main__":
    sys.exit(main())
