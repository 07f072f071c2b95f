"""Clients that stream one answer after the other: python steady_streams.py URL CLIENTS

They end when their standard input does, after the answers that they are reading.
Prints "streaming" when all clients have had tokens. At the end, prints as JSON how many streams were "whole" and, if
there were such, how many had "other tokens" than an earlier stream of the same prompt, were "cut" or failed.
"""

import asyncio
import json
import sys
from collections import Counter

import httpx

TOKENS = 200


async def client(
    http: httpx.AsyncClient, number: int, ending: asyncio.Event, known: dict[str, list[int]], idle: set[int]
) -> Counter[str]:
    results: Counter[str] = Counter()
    while not ending.is_set():
        prompt = f"The module number {number % 3} defines"
        tokens: list[int] = []
        body = {
            "model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        try:
            async with http.stream("POST", "/v1/completions", json=body) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        for choice in json.loads(line[6:]).get("choices", []):
                            tokens += choice.get("token_ids") or []
                            if idle == {number}:
                                print("streaming", flush=True)
                            idle.discard(number)
        except httpx.HTTPError as error:
            results[repr(error)] += 1
            continue
        if len(tokens) != TOKENS:
            results["cut"] += 1
        else:
            results["whole" if known.setdefault(prompt, tokens) == tokens else "other tokens"] += 1
    return results


async def end_with_input(ending: asyncio.Event) -> None:
    await asyncio.to_thread(sys.stdin.read)
    ending.set()


async def main(url: str, count: int) -> None:
    ending = asyncio.Event()
    until_ending = asyncio.create_task(end_with_input(ending))
    known: dict[str, list[int]] = {}
    idle = set(range(count))
    async with httpx.AsyncClient(base_url=url, timeout=90) as http:
        results = await asyncio.gather(*(client(http, number, ending, known, idle) for number in range(count)))
    await until_ending
    print(json.dumps(sum(results, Counter())))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
