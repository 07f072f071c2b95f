"""Code completion: the time to the first token after an edit at the end of a long file, as an editor waits for it.

    python benchmarks/code_completion.py [--model smollm2] [--tokens 4000] [--edits 20] [--editors 8]

Each editor has a file of its own, whose text is sent whole with every request, over HTTP, for 16 tokens of completion.
After each completion the user has typed the beginning of one more line. The file is computed once; then only the edit
is. For comparison, the same requests with another `cache_salt` each, so that the whole file is computed again.

The KV cache has been full once before, as in a server that has been up for a while: the system gives memory to a page
when it is used for the first time, which can take 2 ms on a virtual machine.

The clients run on the server's cores, which real editors do not: so they are the light ones of `octavo bench serve`.
The clock runs from connecting to the first token, and starts when the request's JSON is ready.
"""

import argparse
import asyncio
import inspect
import itertools
import statistics
from typing import Any

import httpx
import msgspec
import uvloop
from live_server import LiveServer
from rich.console import Console
from rich.table import Table

from octavo.bench.http import Endpoint, find_endpoint, send

MAX_TOKENS = 16
FILLER, PAGE_SIZE = 6000, 32  # tokens


class Editor:
    """A user with a file, which begins with `number` so that no two files share a page."""

    def __init__(self, http: httpx.AsyncClient, endpoint: Endpoint, number: int):
        self.http, self.endpoint, self.number, self.text = http, endpoint, number, ""

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

    def edit(self, number: int, **terms: Any) -> bytes:
        """Type the beginning of a line, and return the request for its completion."""
        self.text += f"\n    option_{number} = "
        body = {"prompt": self.text, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        return msgspec.json.encode({"model": self.endpoint.model} | body | terms)

    async def first_token(self, body: bytes) -> float:
        """Send a request, and return the seconds until the first token of its completion."""
        times = await send(self.endpoint, body, input_tokens=0)
        assert not times.error, times.error
        return times.arrivals[0] - times.sent


async def fill_cache(http: httpx.AsyncClient, model: str) -> None:
    """Send long prompts until every page of the KV cache has been used."""
    last = False
    for token in itertools.count(100):
        body = {"model": model, "prompt": [token] * FILLER, "max_tokens": 1}
        (await http.post("/v1/completions", json=body)).raise_for_status()
        if last:
            return
        [served] = (await http.get("/stats")).raise_for_status().json()["models"]
        last = served["engine"]["free_pages"] < FILLER // PAGE_SIZE


async def measure(url: str, tokens: int, edits: int, editors: int) -> None:
    """Print the medians of one editor with and without a cache, and of several editors at once."""
    table = Table("editors", "file in the cache", "first token, ms: median", "longest")
    endpoint = find_endpoint(url, "/completions", None, None, ignore_eos=True)
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        def add_row(count: int, cached: str, times: list[float]) -> None:
            table.add_row(str(count), cached, f"{1000 * statistics.median(times):.1f}", f"{1000 * max(times):.1f}")

        await fill_cache(http, endpoint.model)
        one = Editor(http, endpoint, 0)
        await one.open(tokens)
        await one.first_token(one.edit(0))
        cached = [await one.first_token(one.edit(number)) for number in range(1, edits + 1)]
        add_row(1, "yes", cached)
        salts = [f"edit {number}" for number in range(max(3, edits // 4))]
        whole = [await one.first_token(one.edit(0, cache_salt=salt)) for salt in salts]
        add_row(1, "no", whole)
        users = [Editor(http, endpoint, number) for number in range(1, editors + 1)]
        for user in users:
            await user.open(tokens)
            await user.first_token(user.edit(0))
        together = []
        for number in range(1, edits + 1):
            bodies = [user.edit(number) for user in users]
            together += await asyncio.gather(*map(Editor.first_token, users, bodies))
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
    parser.add_argument("--kv-cache-memory", default="1GiB", help="at least what the files need")
    arguments = parser.parse_args()
    flags = ["--access-log", "none", "--kv-cache-memory", arguments.kv_cache_memory]
    with LiveServer(arguments.model, flags) as server:
        uvloop.run(measure(server.url, arguments.tokens, arguments.edits, arguments.editors))


if __name__ == "__main__":
    main()
