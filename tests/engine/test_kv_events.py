"""KV events over ZeroMQ: what a subscriber that decodes as vLLM's does knows about the engines' caches."""

import asyncio
import os
import signal
import socket
from array import array
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from octavo import AsyncLLM, SamplingParams
from octavo.errors import ConfigError
from octavo.frontend.kv_events import END
from octavo.kv import Prefix, root_key

ONE = SamplingParams(max_tokens=1)


# As in vLLM 0.33's vllm/distributed/kv_events.py: a batch is an array, an event a map with its type.
class Event(msgspec.Struct, tag=True):
    pass


class BlockStored(Event):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None


class BlockRemoved(Event):
    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(Event):
    pass


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Subscriber:
    """Keeps the tokens of every page that each engine has, by rank and hash."""

    def __init__(self, endpoint: str):
        self.context = zmq.asyncio.Context()
        self.context.linger = 0
        self.socket = self.context.socket(zmq.SUB)
        self.socket.subscribe(b"")
        self.socket.connect(endpoint)
        self.pages: dict[int, dict[int, list[int]]] = {}
        self.stored: list[BlockStored] = []
        self.numbers: list[int] = []

    async def take(self) -> None:
        topic, number, payload = await self.socket.recv_multipart()
        assert topic == b""
        self.numbers.append(int.from_bytes(number, "big"))
        batch = msgspec.msgpack.decode(payload, type=Batch)
        assert batch.data_parallel_rank is not None
        pages = self.pages.setdefault(batch.data_parallel_rank, {})
        for event in batch.events:
            match event:
                case AllBlocksCleared():
                    pages.clear()
                case BlockRemoved():
                    for block in event.block_hashes:
                        pages.pop(block, None)  # unknown if it was stored before this subscriber connected
                case BlockStored():
                    self.stored.append(event)
                    size = event.block_size
                    assert len(event.token_ids) == size * len(event.block_hashes)
                    for i, block in enumerate(event.block_hashes):
                        pages[block] = event.token_ids[i * size : (i + 1) * size]

    def events_with(self, blocks: Iterable[int]) -> list[BlockStored]:
        return [event for event in self.stored if not set(event.block_hashes).isdisjoint(blocks)]

    async def until(self, condition: Any) -> None:
        while not condition():
            await self.take()

    def __enter__(self) -> "Subscriber":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)


def free_endpoint() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def endpoint() -> Iterator[str]:
    yield free_endpoint()


def expected(llm: AsyncLLM, prompt: list[int], tenant: str = "") -> dict[int, list[int]]:
    size = llm.info.page_size
    prefix = Prefix(root_key(llm.info.fingerprint, tenant, ""), array("i", prompt), size)
    pages = range(len(prompt) // size)
    return {int.from_bytes(prefix.key(i)[:8], "big"): prompt[i * size : (i + 1) * size] for i in pages}


async def subscribed(llm: AsyncLLM, subscriber: Subscriber) -> AsyncIterator[int]:
    """Make engines compute prompts until the subscriber, whose connection takes a moment, receives events."""
    token = 5
    while not subscriber.numbers:
        token += 1
        await llm.agenerate([[token] * 64], ONE)
        try:
            await asyncio.wait_for(subscriber.take(), 0.2)
        except TimeoutError:
            continue
    yield token


def test_pages_of_a_prompt_and_of_a_tenant(tiny_llama: Path, endpoint: str) -> None:
    async def main(subscriber: Subscriber) -> None:
        async with AsyncLLM(str(tiny_llama), kv_events=endpoint) as llm, asyncio.timeout(60):
            async for _ in subscribed(llm, subscriber):
                pass
            prompt = [7, *range(10, 110)]
            await llm.agenerate([prompt], ONE)
            want = expected(llm, prompt)
            await subscriber.until(lambda: want.keys() <= subscriber.pages[0].keys())
            assert {block: subscriber.pages[0][block] for block in want} == want and len(want) == 3
            [event] = subscriber.events_with(want)
            assert (event.block_hashes, event.parent_block_hash) == (list(want), None)
            assert (event.block_size, event.extra_keys, event.medium) == (32, None, "GPU")
            longer = prompt + list(range(10, 60))
            await llm.agenerate([longer], ONE)
            added = expected(llm, longer).keys() - want.keys()
            await subscriber.until(lambda: subscriber.events_with(added))
            assert subscriber.events_with(added)[0].parent_block_hash == list(want)[-1]
            await llm.agenerate([prompt], ONE, tenant="other")
            of_other = expected(llm, prompt, "other")
            await subscriber.until(lambda: of_other.keys() <= subscriber.pages[0].keys())
            keys = subscriber.events_with(of_other)[0].extra_keys
            assert keys is not None and len(set(keys)) == 1 and keys[0] is not None

    with Subscriber(endpoint) as subscriber:
        asyncio.run(main(subscriber))


def test_evicted_pages_and_a_crash(tiny_llama: Path, endpoint: str) -> None:
    """A subscriber knows what the frontend's router knows, which the engine's messages say."""

    async def main(subscriber: Subscriber) -> None:
        settings: dict[str, Any] = {"data_parallel_size": 2, "max_model_len": 128, "kv_cache_memory": 24576 * 8}
        async with AsyncLLM(str(tiny_llama), kv_events=endpoint, **settings) as llm, asyncio.timeout(60):
            async for token in subscribed(llm, subscriber):
                first = token
            replicas = llm._frontend.replicas

            def knows_all() -> bool:
                known = {rank: set(pages) for rank, pages in subscriber.pages.items() if pages}
                there = {
                    replica.number: {int.from_bytes(key[:8], "big") for key in replica.load.pages}
                    for replica in replicas
                    if replica.load.pages
                }
                return known == there

            await llm.agenerate([[token] * 100 for token in range(first + 1, first + 20)], ONE)  # many evict others
            await subscriber.until(knows_all)
            assert subscriber.numbers == list(range(subscriber.numbers[0], subscriber.numbers[-1] + 1))
            assert replicas[0].link is not None and replicas[0].link.pid is not None
            os.kill(replicas[0].link.pid, signal.SIGKILL)
            await subscriber.until(lambda: subscriber.pages[0] == {} and knows_all())

    with Subscriber(endpoint) as subscriber:
        asyncio.run(main(subscriber))


def test_messages_again(tiny_llama: Path, endpoint: str) -> None:
    async def main() -> None:
        replay = free_endpoint()
        async with (
            AsyncLLM(str(tiny_llama), kv_events=endpoint, kv_events_replay=replay) as llm,
            asyncio.timeout(60),
        ):
            for token in (5, 6, 7):
                await llm.agenerate([[token] * 64], ONE)
            context = zmq.asyncio.Context()
            context.linger = 0
            client = context.socket(zmq.DEALER)
            client.connect(replay)
            numbers: list[int] = []
            while len(numbers) < 3:  # the last one may not be published yet
                await client.send_multipart((b"", (1).to_bytes(8, "big")))
                numbers = []
                while (message := await client.recv_multipart())[1] != END:
                    _, number, payload = message
                    numbers.append(int.from_bytes(number, "big"))
                    msgspec.msgpack.decode(payload, type=Batch)
            assert numbers == [1, 2, 3]
            context.destroy(linger=0)

    asyncio.run(main())


def test_an_address_that_is_taken(tiny_llama: Path) -> None:
    async def main(endpoint: str) -> None:
        llm = AsyncLLM(str(tiny_llama), kv_events=endpoint)
        try:
            await llm.start()
        finally:
            await llm.close()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        for endpoint in (f"tcp://127.0.0.1:{taken.getsockname()[1]}", "nonsense"):
            with pytest.raises(ConfigError, match="kv_events: cannot listen on"):
                asyncio.run(main(endpoint))
