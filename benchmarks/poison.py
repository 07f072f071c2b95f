"""Poison: one request that always crashes the engine, among others that stream.

    python benchmarks/poison.py [--model smollm2] [--others 50] [flags of octavo serve, after --]

Printed: how the poison ended, whether the others got the tokens of an undisturbed run, their longest gap, and how often
the server was not ready. The exit code is 1 if the poison did anything but fail alone.
"""

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from live_server import LiveServer, stream

SUPPORT = Path(__file__).parents[1] / "tests" / "support"
POISON = [7, 7, 7]  # of hostile_policy.Crash


async def answer(client: httpx.AsyncClient, body: dict[str, Any], gaps: list[float]) -> str:
    """Return the text of a stream, and note the time between its events."""
    text, last = "", None
    async for _, part in stream(client, body):
        now = time.monotonic()
        if last is not None:
            gaps.append(now - last)
        text, last = text + part, now
    return text


async def attack(server: LiveServer, arguments: argparse.Namespace) -> bool:
    common = {"max_tokens": arguments.max_tokens, "ignore_eos": True, "stream": True}
    bodies = [{**common, "prompt": f"Item {i} of the list is", "seed": i} for i in range(arguments.others)]
    limits = httpx.Limits(max_connections=None)
    unready, fate = [0], ""
    gaps: list[float] = []

    async def watch(client: httpx.AsyncClient) -> None:
        """Count how often the server stops being ready."""
        was_ready = True
        while True:
            is_ready = (await client.get("/ready")).status_code == 200
            unready[0] += was_ready and not is_ready
            was_ready = is_ready
            await asyncio.sleep(0.02)

    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        calm: list[float] = []
        expected = await asyncio.gather(*(answer(client, body, calm) for body in bodies))
        watching = asyncio.ensure_future(watch(client))
        others = [asyncio.ensure_future(answer(client, body, gaps)) for body in bodies]
        while len(gaps) < arguments.others:  # until they stream
            await asyncio.sleep(0.01)
        start = time.monotonic()
        try:
            await answer(client, {**common, "prompt": POISON}, [])
        except RuntimeError as error:
            fate = str(error)
        failed_after = time.monotonic() - start
        texts = await asyncio.gather(*others, return_exceptions=True)
        watching.cancel()
    right = sum(text == one for text, one in zip(texts, expected, strict=True))
    print(f"the poison, after {failed_after:.1f} s: {fate or 'it was answered'}")
    print(f"others with the right text: {right} of {arguments.others}; longest gap {max(gaps):.2f} s", end="")
    print(f" (undisturbed {max(calm):.2f} s); times not ready: {unready[0]}")
    return bool(fate) and right == arguments.others


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--others", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("flags", nargs="*", help="flags of octavo serve, after --")
    arguments = parser.parse_args()
    flags = ["--scheduling-policy", "hostile_policy:Crash", *arguments.flags]
    with LiveServer(arguments.model, flags, pythonpath=str(SUPPORT)) as server:
        return 0 if asyncio.run(attack(server, arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
