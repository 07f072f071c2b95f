"""What a frontend costs by its load and by the number of its engines: python benchmarks/frontend_load.py

- Memory: bytes of the router per page and per engine.
- Time: of a choice of the router, of taking over pages, and of looking for a queue to relieve, by number of engines.
- Processor time of a server per request, per token of prompts, per token of answers and per message of an engine: a
  server whose engines sleep (see sleeping_engine.py) gets loads of different shapes over HTTP, and the costs are fitted
  to the processor time that its process has used. Other programs on the machine disturb this little.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from octavo.frontend.placement import Placement
from octavo.frontend.replica import Replica
from octavo.frontend.router import Load, Router
from octavo.kv import page_keys, root_key
from octavo.kv.prefix import KEY_BYTES
from octavo.simulation import CostModel
from octavo.simulation.measure import nonnegative_fit

PAGE_SIZE, PAGES = 32, 1000  # pages of each engine
ENGINES = (1, 4, 16, 50, 100, 250, 1000)
PROMPT, CACHED = 1024, 512  # tokens of a prompt, and those that some engines have
ROUNDS = 300
COSTS = CostModel(
    settings={}, machine={}, page_size=PAGE_SIZE, page_bytes=1, num_pages=20_000, max_model_len=8192,
    rows_ms=[(1, 10.0), (4096, 10.0)], sampled_ms=[(1, 0.0)], kv_token_us=0.0, pair_us=0.0, step_ms=0.0,
    sequence_us=0.0, row_us=0.0,
)  # fmt: skip
WORD = "word "


@dataclass(frozen=True)
class Shape:
    """A load: clients that each send one streamed request after another."""

    clients: int
    requests: int  # of each client
    prompt: int  # words
    output: int  # tokens


SHAPES = (
    Shape(8, 40, 8, 1),
    Shape(8, 20, 1500, 1),
    Shape(1, 4, 8, 200),
    Shape(4, 4, 8, 200),
    Shape(16, 3, 8, 200),
    Shape(64, 2, 8, 100),
    Shape(16, 10, 400, 20),
)


def main() -> None:
    """Print tables of all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="whose tokenizer to use (default: %(default)s)")
    parser.add_argument("--serve", type=int, metavar="FD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.model, args.serve)
        return
    print_memory()
    print_times()
    print_server(args.model)


# Memory and time by number of engines


def print_memory() -> None:
    """Print the bytes of router state per page, if one engine or several have it, and per engine."""
    router, before = Router(), resident()
    loads = [router.new_replica() for _ in range(1000)]
    table = Table("router state", "bytes")
    table.add_row("per engine, without pages", f"{(resident() - before) / 1000:,.0f}")
    keys, before = os.urandom(KEY_BYTES * 1_000_000), resident()
    for i in range(50):
        publish(loads[i], keys[i * 20_000 * KEY_BYTES : (i + 1) * 20_000 * KEY_BYTES])
    one = (resident() - before) / 1e6
    table.add_row("per page of one engine", f"{one:,.0f}")
    before = resident()
    for load in loads[50:54]:
        publish(load, keys[: 250_000 * KEY_BYTES])
    table.add_row("per page that further engines have too", f"{(resident() - before) / 1e6:,.0f}")
    Console().print(table)


def resident() -> int:
    """Return the bytes of memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def publish(load: Load, keys: bytes) -> None:
    assert load.publish(load.number, keys, b"")


@dataclass(eq=False)
class Place:
    """As much of a Replica as placement looks at."""

    load: Load
    is_open: bool = True


def print_times() -> None:
    """Print the microseconds of what a frontend does, by number of engines."""
    table = Table("engines", "choice (µs)", "64 pages gained (µs)", "look for a queue (µs)", "choices per second")
    for count in ENGINES:
        chosen, gained, looked = times_of(count)
        table.add_row(f"{count:,}", *(f"{value:,.1f}" for value in (chosen, gained, looked)), f"{1e6 / chosen:,.0f}")
    Console().print(table)


def times_of(count: int) -> tuple[float, float, float]:
    """Return the microseconds of a choice, of taking over 64 pages, and of a look for a queue, for so many engines."""
    prompts = [[random.randrange(50_000) for _ in range(PROMPT)] for _ in range(20)]
    router, placement = Router(), Placement(512)
    loads = [router.new_replica() for _ in range(count)]
    for i, load in enumerate(loads):
        load.add("a request", 10 * (i % 5), 1 + i % 3)
        publish(load, os.urandom(KEY_BYTES * PAGES) + b"".join(keys_of(prompts[i % 20][:CACHED])))
    placement.replicas = [cast(Replica, Place(load)) for load in loads]
    idle = cast(Replica, Place(router.new_replica()))
    return (
        microseconds(lambda i: router.choose(loads, PROMPT, keys_of(prompts[i % 20]), PAGE_SIZE)),
        microseconds(lambda i: publish(loads[i % count], os.urandom(KEY_BYTES * 64))),
        microseconds(lambda i: placement.relieve_others(idle)),
    )


def keys_of(tokens: list[int]) -> Iterator[bytes]:
    return page_keys(root_key("fingerprint", "tenant", ""), tokens, PAGE_SIZE)


def microseconds(do: Callable[[int], object]) -> float:
    """Return the median time of a call."""
    times = []
    for i in range(ROUNDS):
        began = time.perf_counter()
        do(i)
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


# A server


def print_server(model: str) -> None:
    """Print the microseconds of a server's process per request, token and message."""
    work, taken = [], []
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        os.environ["COSTS"] = str(Path(folder) / "costs.json")
        COSTS.save(Path(os.environ["COSTS"]))
        command = [sys.executable, __file__, "--model", model, "--serve", str(listener.fileno())]
        server = subprocess.Popen(command, pass_fds=[listener.fileno()], stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            port = listener.getsockname()[1]
            asyncio.run(send(port, SHAPES[-1]))  # the first requests load what later ones have
            for shape in SHAPES:
                before, messages = cpu_seconds(server.pid), steps(port)
                prompt_tokens = asyncio.run(send(port, shape))
                requests = shape.clients * shape.requests
                work.append([requests, prompt_tokens, requests * shape.output, steps(port) - messages])
                taken.append(cpu_seconds(server.pid) - before)
                print(shape, work[-1], f"{taken[-1]:.2f} s of CPU", flush=True)
        finally:
            server.terminate()
            server.wait()
    times = np.array(taken)
    costs = 1e6 * nonnegative_fit(np.array(work, float) / times[:, None], np.ones(len(times)))
    table = Table("processor time of a frontend", "µs")
    for name, cost in zip(("per request", "per prompt token", "per token", "per message"), costs, strict=True):
        table.add_row(name, f"{cost:,.1f}")
    errors = np.abs(np.array(work) @ costs / 1e6 / times - 1)
    Console().print(
        table, f"The fit is off by {errors.mean():.0%} in the mean of the loads, {errors.max():.0%} at most"
    )


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process's threads, without the processes that it started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def steps(port: int) -> int:
    """Return the number of steps of the server's engines: each sends one message with tokens."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats") as response:
        return int(json.load(response)["models"][0]["engine"]["steps"])


async def send(port: int, shape: Shape) -> int:
    """Send the requests of a load. Return the tokens of their prompts."""

    async def client(number: int) -> int:
        tokens = 0
        for i in range(shape.requests):
            prompt = f"{number} {i} {random.random()} " + WORD * shape.prompt
            tokens += await complete(port, {"prompt": prompt, "max_tokens": shape.output})
        return tokens

    return sum(await asyncio.gather(*map(client, range(shape.clients))))


async def complete(port: int, body: dict[str, Any]) -> int:
    """Stream a completion. Return the tokens of its prompt."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    options = {"stream": True, "ignore_eos": True, "temperature": 0, "stream_options": {"include_usage": True}}
    content = json.dumps(body | options).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
    )
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    answer = await reader.read(-1)
    writer.close()
    usage = next(line for line in reversed(answer.splitlines()) if b'"usage":{' in line.replace(b" ", b""))
    return int(json.loads(usage.removeprefix(b"data: "))["usage"]["prompt_tokens"])


def serve(model: str, fd: int) -> None:
    """Serve with an engine that sleeps, as octavo serve does."""
    import uvloop
    from sleeping_engine import SleepingLLM

    from octavo.config import EngineConfig
    from octavo.fleet.fleet import Fleet
    from octavo.server.app import create_app
    from octavo.server.config import ServerConfig
    from octavo.server.edge.access_log import AccessLog
    from octavo.server.edge.draining import DrainingServer

    async def run() -> None:
        config = ServerConfig()
        engine = EngineConfig(model=model, max_batch_tokens=4096)
        async with SleepingLLM.of(engine, Path(os.environ["COSTS"])) as llm:
            app = create_app(Fleet.of(llm), config, draining=lambda: server.should_exit)
            ready = lambda: print("ready", flush=True)  # noqa: E731
            server = DrainingServer(app, config, AccessLog("none", None), on_ready=ready)
            await server.serve([socket.socket(fileno=fd)])

    uvloop.run(run())


if __name__ == "__main__":
    main()
