"""What engines gain by fetching pages from each other: python benchmarks/pages_between_engines.py fetch|roles [MODEL]

fetch: time to first token of a long prompt on an engine that has never seen it, and on one that fetches its pages from
the engine that has just computed it. roles: the times between the tokens of streams while long prompts arrive, with an
engine of role prefill and one of role decode, and with two that do both. Engines are processes of `octavo engine` over
loopback with one thread each, so their pages are encrypted on the way.
"""

import argparse
import asyncio
import contextlib
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from octavo import AsyncLLM, SamplingParams

PROMPT = 4000  # tokens of the prompt of `fetch`
ROUNDS = 3
STREAMS, LONG, EVERY, SECONDS = 4, 1000, 3.0, 15.0  # of `roles`: long prompts of LONG tokens arrive EVERY seconds


def random_tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1000, 40_000) for _ in range(length)]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.asynccontextmanager
async def fleet(model: str, roles: Sequence[str]) -> AsyncIterator[AsyncLLM]:
    """Run engines of these roles, and a frontend in this process."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "secret").write_text(secrets.token_hex(32))
        shared = ["--secret-file", str(folder / "secret")]
        urls = [f"tcp://127.0.0.1:{free_port()}" for _ in roles]
        code = "from octavo.entrypoints.command import main; main()"
        for url, role in zip(urls, roles, strict=True):
            flags = ["--threads", "1", "--kv-cache-memory", "600MiB", "--listen", url, "--role", role, *shared]
            command = [sys.executable, "-c", code, "engine", model, *flags]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        async with AsyncLLM(engines=urls, secret_file=str(folder / "secret")) as llm:
            while sum(replica.is_ready for replica in await llm.replica_stats()) < len(roles):
                await asyncio.sleep(0.1)
            yield llm


async def times(llm: AsyncLLM, prompt: list[int], max_tokens: int) -> tuple[list[float], list[int]]:
    """Return when each token came, in seconds from now, and the tokens."""
    began, arrived, tokens = time.perf_counter(), list[float](), list[int]()
    async for output in llm.stream({"prompt_token_ids": prompt}, greedy(max_tokens)):
        increment = output.outputs[0]
        arrived += [time.perf_counter() - began] * len(increment.token_ids)
        tokens += increment.token_ids
    return arrived, tokens


async def fetch(model: str) -> Table:
    table = Table("round", "cold", "by fetch", "share", "pages", title=f"First token of {PROMPT:,} tokens, {model}")
    async with fleet(model, ["both", "both"]) as llm:
        rng, replicas = random.Random(1), llm._frontend.replicas

        async def ask(number: int, prompt: list[int]) -> tuple[list[float], list[int]]:
            """On one engine, whatever the router would choose. The other one is there, but gets no requests."""
            replicas[1 - number].is_leaving = True
            result = await times(llm, prompt, 4)
            replicas[1 - number].is_leaving = False
            return result

        async def fetched(number: int) -> int:
            engine = (await llm.replica_stats())[number].engine
            return engine.tiers["peers"].hits if engine is not None else 0

        for number in (0, 1):
            await ask(number, random_tokens(rng, 600))
        for number in range(ROUNDS):
            prompt, before = random_tokens(rng, PROMPT), await fetched(1)
            cold, expected = await ask(0, prompt)
            hot, tokens = await ask(1, prompt)
            assert tokens == expected, "the tokens differ"
            pages = await fetched(1) - before
            table.add_row(f"{number + 1}", f"{cold[0]:.2f} s", f"{hot[0]:.2f} s", f"{hot[0] / cold[0]:.1%}", str(pages))
    return table


async def roles(model: str) -> Table:
    title = f"{STREAMS} streams while a prompt of {LONG:,} tokens arrives every {EVERY:g} s, {model}"
    columns = ("time per token: median", "p95", "p99", "longest", "first token of long prompts: median")
    table = Table("roles", *columns, title=title)
    for kinds in (["both", "both"], ["prefill", "decode"]):
        async with fleet(model, kinds) as llm:
            rng = random.Random(2)
            await asyncio.gather(*(times(llm, random_tokens(rng, 600), 4) for _ in range(4)))
            gaps, firsts = await under_long_prompts(llm, rng)
        between = statistics.quantiles(gaps, n=100)
        numbers = [statistics.median(gaps), between[94], between[98], max(gaps)]
        shown = [f"{1000 * number:.0f} ms" for number in numbers]
        table.add_row(", ".join(kinds), *shown, f"{statistics.median(firsts):.2f} s")
    return table


async def under_long_prompts(llm: AsyncLLM, rng: random.Random) -> tuple[list[float], list[float]]:
    """Return the times between tokens of the streams, and those to the first token of the long prompts."""
    end, gaps, firsts = time.perf_counter() + SECONDS, list[float](), list[float]()

    async def stream() -> None:
        while time.perf_counter() < end:
            arrived, _ = await times(llm, random_tokens(rng, 64), 200)
            gaps.extend(later - earlier for earlier, later in pairwise(arrived))

    async def long() -> None:
        arrived, _ = await times(llm, random_tokens(rng, LONG), 8)
        firsts.append(arrived[0])

    tasks = [asyncio.ensure_future(stream()) for _ in range(STREAMS)]
    while time.perf_counter() < end:
        tasks.append(asyncio.ensure_future(long()))
        await asyncio.sleep(EVERY)
    await asyncio.gather(*tasks)
    return gaps, firsts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["fetch", "roles"])
    parser.add_argument("model", nargs="?", default="smollm2")
    arguments = parser.parse_args()
    measure = fetch if arguments.what == "fetch" else roles
    Console().print(asyncio.run(measure(arguments.model)))


if __name__ == "__main__":
    main()
