"""Stalls: large and hostile bodies, one after the other, while others stream.

    python benchmarks/stalls.py [--model smollm2] [--streams 16] [flags of octavo serve, after --]

For each body: the status of its answer and the time to it, the slowest answer of /health meanwhile, the longest gap in
a stream, and how much more memory the server and its children hold five seconds later than before. The first line has
no body: what the machine does undisturbed. The exit code is 1 if /health took more than 100 ms, a gap was more than
250 ms longer than the longest without a body, or more than 200 MB were kept.
"""

import argparse
import asyncio
import contextlib
import gzip
import json
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
from live_server import LiveServer, stream

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HEALTH_LIMIT, GAP_LIMIT, MEMORY_LIMIT = 0.100, 0.250, 200e6


@dataclass(frozen=True)
class Attack:
    name: str
    path: str
    body: bytes
    headers: tuple[str, ...] = ()


def attacks(size: int = 16 * 2**20) -> Iterator[Attack]:
    """Yield bodies that once stalled Octavo, then bodies of almost `size` bytes of anything else."""
    size -= 200

    def completion(name: str, **fields: object) -> Attack:
        return Attack(name, COMPLETIONS, json.dumps({"prompt": "x", "max_tokens": 4, **fields}).encode())

    def chat(name: str, messages: object, **fields: object) -> Attack:
        return Attack(name, CHAT, json.dumps({"messages": messages, "max_tokens": 4, **fields}).encode())

    def filled(name: str, path: str, before: bytes, part: bytes, after: bytes, *headers: str) -> Attack:
        body = before + part * ((size - len(before) - len(after)) // len(part)) + after
        return Attack(name, path, gzip.compress(body, 1) if headers else body, headers)

    yield completion("text of 14.8 MB", prompt="z q " * 3_700_000)
    yield chat("400,000 empty messages", [{"role": "user", "content": ""}] * 400_000)
    almost = "a" * 124_000
    yield completion("16 stop strings of 124 KB", stop=[almost + str(i) for i in range(16)], max_tokens=200)
    yield completion("16 stop strings of 1 KB", stop=[" and" * 255 + str(i) for i in range(16)], max_tokens=200)
    yield chat("full: a message", [{"role": "user", "content": "y n " * (size // 4 - 30)}])
    yield chat("full: 2,048 messages", [{"role": "user", "content": "word " * (size // 12000)}] * 2048)
    parts = [{"type": "text", "text": "t" * (size // 4500)}]
    yield chat("full: 4,096 content parts", [{"role": "user", "content": parts * 4096}])
    before, after = b'{"max_tokens":4,"prompt":"', b'"}'
    yield filled("full: one letter", COMPLETIONS, before, b"a", after)
    yield filled("full: spaces", COMPLETIONS, before, b" ", after)
    yield filled("full: emoji", COMPLETIONS, before, "\U0001f600".encode(), after)
    yield filled("full: combining marks", COMPLETIONS, before, "e\u0301\u0323".encode(), after)
    yield filled("full: escapes", COMPLETIONS, before, b"\\u00e9", after)
    yield filled("full: random words", COMPLETIONS, before, b"Zx9_(q) \\n", after)
    yield filled("full: prompts", COMPLETIONS, b'{"max_tokens":4,"prompt":["a"', b',"a"', b"]}")
    yield filled("full: token ids", COMPLETIONS, b'{"max_tokens":4,"prompt":[1', b",1", b"]}")
    yield filled("full: long integers", COMPLETIONS, b'{"prompt":[1', b"," + b"1" * 4300, b"]}")
    yield filled("full: one integer", COMPLETIONS, b'{"prompt":"x","seed":1', b"1", b"}")
    yield filled("full: digits of a number", COMPLETIONS, b'{"prompt":"x","temperature":0.1', b"1", b"}")
    yield filled("full: brackets", COMPLETIONS, b'{"prompt":', b"[", b"}")
    yield filled("full: objects", COMPLETIONS, b'{"prompt":"x","logit_bias":[{}', b",{}", b"]}")
    yield filled("full: blanks between", COMPLETIONS, b'{"prompt":"x","max_tokens":4', b" ", b"}")
    yield filled("full: an unknown field", COMPLETIONS, b'{"prompt":"x","whatever":"', b"q", b'"}')
    yield filled("full: a field's name", COMPLETIONS, b'{"prompt":"x","', b"q", b'":1}')
    yield filled("full: a model's name", COMPLETIONS, b'{"prompt":"x","model":"', b"q", b'"}')
    yield filled("full: a tenant", COMPLETIONS, b'{"prompt":"x","tenant":"', b"q", b'"}')
    yield filled("full: a salt", COMPLETIONS, b'{"prompt":"x","cache_salt":"', b"q", b'"}')
    yield filled("full: a KV state", COMPLETIONS, b'{"prompt":"x","kv_cache_state":"', b"q", b'"}')
    yield filled("full: stop", COMPLETIONS, b'{"prompt":"x","stop":["', b"q", b'"]}')
    yield filled("full: stop strings", COMPLETIONS, b'{"prompt":"x","stop":["q"', b',"q"', b"]}")
    bias = ",".join(f'"{i}":1' for i in range(size // 9)).encode()
    yield Attack(
        "full: logit_bias",
        COMPLETIONS,
        b'{"prompt":"x","logit_bias":{' + bias[: bias.rindex(b",", 0, size - 100)] + b"}}",
    )
    keys = ",".join(f'"key{i}":1' for i in range(size // 12)).encode()
    yield Attack("full: fields", COMPLETIONS, b'{"prompt":"x",' + keys[: keys.rindex(b",", 0, size - 100)] + b"}")
    yield filled("full: a role", CHAT, b'{"messages":[{"content":"x","role":"', b"q", b'"}]}')
    user = b'{"messages":[{"content":"x","role":"user"}]'
    yield filled("full: template variable", CHAT, user + b',"max_tokens":4,"chat_template_kwargs":{"a":"', b"q", b'"}}')
    yield filled("full: tool arguments", CHAT,
                 b'{"messages":[{"content":"x","role":"user"},{"role":"assistant","tool_calls":[{"function":'
                 b'{"arguments":"', b"[", b'"}}]},{"content":"x","role":"user"}]}')  # fmt: skip
    yield filled("full: not JSON", COMPLETIONS, b"", b"\xff", b"")
    yield filled("full: gzip", COMPLETIONS, before, b"a", after, "Content-Encoding: gzip")
    bomb = gzip.compress(b" " * 2**30, 9)
    yield Attack("gzip bomb of 1 GiB", COMPLETIONS, bomb, ("Content-Encoding: gzip",))
    yield Attack("full: to a path that is none", "/v1/nothing", b"x" * size)
    yield Attack("full: to a handle", "/v1/kv_states/load", b'{"path":"' + b"q" * size + b'"}')


@dataclass
class Seen:
    """What was seen since it was last reset. Times in seconds."""

    health: float = 0.0
    gap: float = 0.0
    last: dict[int, float] = field(default_factory=dict)  # of each stream: time of its last event

    def reset(self) -> None:
        self.health = self.gap = 0.0


async def keep_streaming(client: httpx.AsyncClient, i: int, seen: Seen) -> None:
    body = {"prompt": f"Stream {i}:", "max_tokens": 400, "ignore_eos": True, "stream": True, "seed": i}
    while True:
        seen.last.pop(i, None)
        async for _ in stream(client, body):
            now = time.monotonic()
            if i in seen.last:
                seen.gap = max(seen.gap, now - seen.last[i])
            seen.last[i] = now


async def keep_probing(client: httpx.AsyncClient, seen: Seen) -> None:
    while True:
        start = time.monotonic()
        (await client.get("/health")).raise_for_status()
        seen.health = max(seen.health, time.monotonic() - start)
        await asyncio.sleep(0.005)


def send(address: tuple[str, int], attack: Attack) -> str:
    """Send a body; return the status of the answer."""
    lines = [f"POST {attack.path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close",
             f"Content-Length: {len(attack.body)}", *attack.headers]  # fmt: skip
    received = b""
    with socket.create_connection(address, timeout=120) as connection:
        with contextlib.suppress(ConnectionError):  # refused before all of it was read
            connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + attack.body)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received += part
    return received[9:12].decode() or "none"


async def measure(server: LiveServer, arguments: argparse.Namespace) -> bool:
    limits, seen, good = httpx.Limits(max_connections=None), Seen(), True
    chosen = [
        attack for attack in attacks(arguments.mebibytes << 20) if not arguments.only or arguments.only in attack.name
    ]
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        tasks = [asyncio.ensure_future(keep_streaming(client, i, seen)) for i in range(arguments.streams)]
        tasks.append(asyncio.ensure_future(keep_probing(client, seen)))
        while len(seen.last) < arguments.streams:
            await asyncio.sleep(0.05)
        seen.reset()
        await asyncio.sleep(arguments.undisturbed)
        calm, calm_health = seen.gap, seen.health
        print(f"{'':32} {'answer':>6} {'s':>6} {'/health ms':>10} {'gap ms':>7} {'MB kept':>7}")
        print(f"{'undisturbed':32} {'':6} {'':6} {calm_health * 1e3:10.0f} {calm * 1e3:7.0f}", flush=True)
        for attack in chosen:
            memory = server.memory()
            seen.reset()
            start = time.monotonic()
            status = await asyncio.to_thread(send, server.address, attack)
            seconds = time.monotonic() - start
            await asyncio.sleep(1.0)
            health, gap = seen.health, seen.gap
            deadline = time.monotonic() + 4.0
            while (kept := server.memory() - memory) > MEMORY_LIMIT and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
            bad = health > HEALTH_LIMIT or gap > calm + GAP_LIMIT or kept > MEMORY_LIMIT
            good = good and not bad
            figures = f"{status:>6} {seconds:6.2f} {health * 1e3:10.0f} {gap * 1e3:7.0f} {kept / 1e6:7.0f}"
            print(f"{attack.name:32} {figures}{'  !' if bad else ''}", flush=True)
        for task in tasks:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.wait(tasks)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--undisturbed", type=float, default=10.0, help="seconds")
    parser.add_argument("--mebibytes", type=int, default=16, help="size of full bodies")
    parser.add_argument("--only", help="bodies whose name contains this")
    parser.add_argument("flags", nargs="*", help="flags of octavo serve, after --")
    arguments = parser.parse_args()
    with LiveServer(arguments.model, arguments.flags) as server:
        return 0 if asyncio.run(measure(server, arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
