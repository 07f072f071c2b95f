"""Code completion: the time to the first token after an edit at the end of a long file, as an editor waits for it.

    python benchmarks/code_completion.py [--model smollm2] [--tokens 4000] [--edits 20] [--editors 8]

Each editor has a file of its own, whose text is sent whole with every request, over HTTP, for 16 tokens of completion.
After each completion the user has typed the beginning of one more line. The file is computed once; then only the edit
is. For comparison, the same requests with another `cache_salt` each, so that the whole file is computed again.
"""

import argparse
import asyncio
import inspect
import statistics
import time
from typing import Any

import httpx
from live_server import LiveServer, stream
from rich.console import Console
from rich.table import Table

MAX_TOKENS = 16


class Editor:
    """A user with a file, which begins with `number` so that no two files share a page."""

    def __init__(self, http: httpx.AsyncClient, number: int):
        self.http, self.number, self.text = http, number, ""

    async def open(self, tokens: int) -> None:
        """Take a file of so many tokens."""
        source = f"# {self.number}\n" + inspect.getsource(argparse)
        ids: list[int] = []
        for characters in (4 * tokens, 8 * tokens):
            reply = await self.http.post("/tokenize", json={"prompt": source[:characters], "add_special_tokens": False})
            ids = reply.raise_for_status().json()["tokens"][:tokens]
            if len(ids) == tokens:
                break
        self.text = (await self.http.post("/detokenize", json={"tokens": ids})).raise_for_status().json()["prompt"]

    async def complete(self, edit: int, **terms: Any) -> float:
        """Type the beginning of a line, and return the seconds until the first token of its completion."""
        self.text += f"\n    option_{edit} = "
        body = {"prompt": self.text, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        begun, first = time.monotonic(), 0.0
        async for _ in stream(self.http, body | terms):
            first = first or time.monotonic() - begun
        return first


async def measure(url: str, tokens: int, edits: int, editors: int) -> None:
    """Print the medians of one editor with and without a cache, and of several editors at once."""
    table = Table("editors", "file in the cache", "first token, ms: median", "longest")
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        def add_row(count: int, cached: str, times: list[float]) -> None:
            table.add_row(str(count), cached, f"{1000 * statistics.median(times):.1f}", f"{1000 * max(times):.1f}")

        one = Editor(http, 0)
        await one.open(tokens)
        await one.complete(0)
        cached = [await one.complete(edit) for edit in range(1, edits + 1)]
        add_row(1, "yes", cached)
        whole = [await one.complete(edit, cache_salt=f"edit {edit}") for edit in range(1, max(3, edits // 4) + 1)]
        add_row(1, "no", whole)
        users = [Editor(http, number) for number in range(1, editors + 1)]
        for user in users:
            await user.open(tokens)
            await user.complete(0)
        together = []
        for edit in range(1, edits + 1):
            together += await asyncio.gather(*(user.complete(edit) for user in users))
        add_row(editors, "yes", together)
    console = Console()
    console.print(table)
    console.print(f"with the cache: {statistics.median(cached) / statistics.median(whole):.1%} of the time without")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--editors", type=int, default=8)
    arguments = parser.parse_args()
    with LiveServer(arguments.model, ["--access-log", "none"]) as server:
        asyncio.run(measure(server.url, arguments.tokens, arguments.edits, arguments.editors))


if __name__ == "__main__":
    main()
