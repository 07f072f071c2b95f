"""KV events: tell routers in front of the server which pages each engine has, in vLLM's format over ZeroMQ.

Each message has three frames: an empty topic, its number (8 bytes, big-endian) and a MessagePack batch. The structs
below encode as those of vLLM 0.33 (vllm/distributed/kv_events.py).
"""

import threading
import time
from array import array
from collections import deque
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from octavo.errors import ConfigError
from octavo.kv.prefix import KEY_BYTES

from .links.messages import Pages

REPLAYED = 10_000  # latest batches that a subscriber may request again
LINGER = 100  # milliseconds to send what is queued at the end
LOOK = 0.05  # seconds between checks for such requests
TOPIC = b""
END = (-1).to_bytes(8, "big", signed=True)  # the number of the message that ends a replay
MEDIUM = "GPU"


class BlockStored(msgspec.Struct, tag=True):
    """Consecutive pages that an engine's cache has gained.

    Attributes:
        parent_block_hash: the page before the first one; None if it begins a prompt.
        medium: the name of vLLM for the memory in which an engine computes, whatever the device.
        extra_keys: for pages that only some requests may use (of a tenant, a cache_salt or a loaded KV state), a name
            for these requests, once for each page.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = MEDIUM
    lora_name: str | None = None
    extra_keys: list[tuple[str, ...] | None] | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """Pages that an engine's cache has lost."""

    block_hashes: list[int]
    medium: str | None = MEDIUM


class AllBlocksCleared(msgspec.Struct, tag=True):
    """An engine's cache is empty, since the engine has started or ended."""


class KVEventBatch(msgspec.Struct, array_like=True):
    """Events of one step of one engine. `ts` is Unix time in seconds."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class KVEvents:
    """Publishes the events of a model's engines from a thread of its own.

    Args:
        endpoint: ZeroMQ address to publish on, such as tcp://*:5557.
        replay: ZeroMQ address at which subscribers that missed messages can request them again; None for none.
        page_size: tokens per page.

    Raises:
        ConfigError: an address cannot be used, or pyzmq is not installed.
    """

    def __init__(self, endpoint: str, replay: str | None, page_size: int):
        try:
            import zmq
        except ModuleNotFoundError:
            raise ConfigError("kv_events needs pyzmq: pip install 'octavo[server]'") from None
        self._page_size = page_size
        self._queue: SimpleQueue[KVEventBatch | None] = SimpleQueue()
        self._context = zmq.Context()
        try:
            self._publisher = _bound(self._context, zmq.PUB, endpoint, "kv_events")
            self._replays = _bound(self._context, zmq.ROUTER, replay, "kv_events_replay") if replay else None
        except ConfigError:
            self._context.destroy()
            raise
        self._thread = threading.Thread(target=self._run, name="octavo-kv-events", daemon=True)
        self._thread.start()

    def changed(self, replica: int, pages: Pages) -> None:
        """Publish the pages that a replica's engine has gained and lost. The message must have the pages' tokens."""
        events: list[Any] = [AllBlocksCleared()] if pages.number == 0 else []
        if lost := hashes(pages.lost):
            events.append(BlockRemoved(lost))
        events += _stored(pages, self._page_size)
        if events:
            self._queue.put(KVEventBatch(time.time(), events, replica))

    def cleared(self, replica: int) -> None:
        """Publish that a replica's engine has ended."""
        self._queue.put(KVEventBatch(time.time(), [AllBlocksCleared()], replica))

    def close(self) -> None:
        """Send what is queued, and stop."""
        self._queue.put(None)
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        latest: deque[tuple[int, bytes]] = deque(maxlen=REPLAYED)
        number, encode = 0, msgspec.msgpack.Encoder().encode
        while True:
            try:
                batch = self._queue.get(timeout=LOOK if self._replays else None)
            except Empty:
                self._replay(latest)
                continue
            if batch is None:
                break
            payload = encode(batch)
            latest.append((number, payload))
            self._publisher.send_multipart((TOPIC, number.to_bytes(8, "big"), payload))
            number += 1
            self._replay(latest)
        self._context.destroy()

    def _replay(self, latest: "deque[tuple[int, bytes]]") -> None:
        """Answer requests for messages from a number on. The answer ends with the number -1."""
        while self._replays is not None and self._replays.poll(0):
            client, _, *rest = self._replays.recv_multipart()
            first = int.from_bytes(rest[0][:8], "big") if rest else 0
            for number, payload in latest:
                if number >= first:
                    self._replays.send_multipart((client, b"", number.to_bytes(8, "big"), payload))
            self._replays.send_multipart((client, b"", END, b""))


def hashes(keys: bytes) -> list[int]:
    """Return 64 bits of each of the concatenated keys, as vLLM's subscribers expect."""
    return [int.from_bytes(key[:8], "big") for key in _split(keys)]


def _stored(pages: Pages, page_size: int) -> list[BlockStored]:
    """Return one event for each run of pages of which each continues the one before."""
    events: list[BlockStored] = []
    tokens = array("i", pages.tokens)
    every = zip(hashes(pages.gained), hashes(pages.parents), _split(pages.roots), strict=False)
    for i, (block, parent, root) in enumerate(every):
        content = tokens[i * page_size : (i + 1) * page_size].tolist()
        if events and events[-1].block_hashes[-1] == parent:
            events[-1].block_hashes.append(block)
            events[-1].token_ids += content
            if events[-1].extra_keys is not None:
                events[-1].extra_keys.append(events[-1].extra_keys[0])
        else:
            extra_keys: list[tuple[str, ...] | None] | None = [(root.hex(),)] if any(root) else None
            events.append(BlockStored([block], parent or None, content, page_size, extra_keys=extra_keys))
    return events


def _split(keys: bytes) -> list[bytes]:
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def _bound(context: Any, kind: int, endpoint: str, setting: str) -> Any:
    import zmq

    socket = context.socket(kind)
    socket.linger = LINGER
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        hint = "give an address such as tcp://*:5557"
        raise ConfigError(f"{setting}: cannot listen on {endpoint} ({error}); {hint}") from None
    return socket
