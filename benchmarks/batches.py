"""Batches beside live chats: how much a batch on /v1/batches slows down eight people who chat.

    python benchmarks/batches.py [--model smollm2] [--chats 8] [--seconds 20] [--rounds 3]

Each client streams answers of 64 tokens, one after another, alternately without a batch and beside one that has more
rows than it can finish. The time per token of an answer is the time from its first token to its last one, divided by
the tokens between. Printed for both: its median and its 95th percentile over all answers, and the median time to the
first token; and how many rows the batch has answered meanwhile.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from live_server import LiveServer
from rich.console import Console
from rich.table import Table

MAX_TOKENS = 64
ROWS = 20_000
QUESTION = "Write a story about the number {}, for a reader who likes detail, long sentences and numbers."


@dataclass
class Answers:
    """Times of answers, in seconds."""

    first_token: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)


async def answer(http: httpx.AsyncClient, number: int, answers: Answers) -> None:
    """Stream an answer and record its times."""
    messages = [{"role": "user", "content": QUESTION.format(number)}]
    body = {"messages": messages, "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": True, "seed": number}
    sent, arrivals = time.monotonic(), list[float]()
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                arrivals.append(time.monotonic())
    answers.first_token.append(arrivals[0] - sent)
    answers.per_token.append((arrivals[-1] - arrivals[0]) / (MAX_TOKENS - 1))


async def chat(http: httpx.AsyncClient, chats: int, seconds: float, answers: Answers) -> None:
    """Let `chats` clients ask, each again as soon as it is answered, for so many seconds."""
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        while time.monotonic() < end:
            await answer(http, number, answers)
            number += chats

    await asyncio.gather(*map(client, range(chats)))


async def begin_batch(http: httpx.AsyncClient) -> str:
    """Begin a batch and return its id when it has answers."""
    rows = []
    for number in range(ROWS):
        messages = [{"role": "user", "content": QUESTION.format(number)}]
        body = {"messages": messages, "max_tokens": MAX_TOKENS, "ignore_eos": True}
        line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
        rows.append(json.dumps(line))
    content = "\n".join(rows).encode()
    file = (await http.post("/v1/files", files={"file": content}, data={"purpose": "batch"})).raise_for_status().json()
    batch = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    id = str((await http.post("/v1/batches", json=batch)).raise_for_status().json()["id"])
    while not await completed(http, id):
        await asyncio.sleep(0.1)
    return id


async def completed(http: httpx.AsyncClient, id: str) -> int:
    reply: Any = (await http.get(f"/v1/batches/{id}")).raise_for_status().json()
    return int(reply["request_counts"]["completed"])


async def measure(url: str, chats: int, seconds: float, rounds: int) -> None:
    alone, beside, rows = Answers(), Answers(), 0
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        await chat(http, chats, 3, Answers())
        for _ in range(rounds):
            await chat(http, chats, seconds, alone)
            id = await begin_batch(http)
            before = await completed(http, id)
            await chat(http, chats, seconds, beside)
            rows += await completed(http, id) - before
            (await http.post(f"/v1/batches/{id}/cancel")).raise_for_status()
            await asyncio.sleep(2)
    table = Table("chats", "answers", "time per token, ms: median", "95th percentile", "first token, ms: median")
    p95 = []
    for name, answers in (("alone", alone), ("beside a batch", beside)):
        p95.append(statistics.quantiles(answers.per_token, n=20)[-1])
        times = (statistics.median(answers.per_token), p95[-1], statistics.median(answers.first_token))
        table.add_row(name, str(len(answers.per_token)), *(f"{1000 * each:.1f}" for each in times))
    console = Console()
    console.print(table)
    console.print(f"beside a batch: {p95[1] / p95[0]:.2f} times the 95th percentile alone; {rows} rows answered")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        LiveServer(arguments.model, ["--access-log", "none", "--data-dir", folder]) as server,
    ):
        asyncio.run(measure(server.url, arguments.chats, arguments.seconds, arguments.rounds))


if __name__ == "__main__":
    main()
