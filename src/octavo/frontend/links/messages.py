"""Messages between a frontend and an engine. In a byte stream, each is a uint32 length followed by MessagePack."""

from collections.abc import Iterator
from typing import Any

import msgspec

from octavo import errors
from octavo.engine.messages import EngineInfo, EngineRequest, EngineStats, TokenOutput
from octavo.kv.peers.access import PeerAccess
from octavo.secret import Secrets
from octavo.tracing.request_events import RequestEvent


class Load(msgspec.Struct, frozen=True, tag=True):
    """The first message to an engine. Answered by Ready or Failed.

    Attributes:
        config: the fields of an EngineConfig.
        path: the model's directory or file.
        replica, replicas: this engine's number, and the number of engines that share the machine's cores and memory.
        secrets: what the frontend has read from the sources that the settings name.
        access: for pages from engine to engine.
    """

    config: dict[str, Any]
    path: str
    replica: int = 0
    replicas: int = 1
    secrets: Secrets = Secrets()
    access: PeerAccess | None = None


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start requests, or continue requests that have output tokens already."""

    requests: list[EngineRequest]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End requests and free their pages; unknown ids are ignored."""

    ids: list[str]


class Pin(msgspec.Struct, frozen=True, tag=True):
    """Keep the pages of a KV state in the pool until running sequences need them."""

    id: str
    tokens: list[int]
    tenant: str
    salt: str
    origin: str = ""


class Unpin(msgspec.Struct, frozen=True, tag=True):
    """Release the pages of a KV state, and close its file if it has one."""

    id: str


class SaveState(msgspec.Struct, frozen=True, tag=True):
    """Write a KV state to a file. Answered by StateDone."""

    id: str
    path: str
    tokens: list[int]
    tenant: str
    salt: str
    origin: str = ""


class LoadState(msgspec.Struct, frozen=True, tag=True):
    """Open the file of a KV state, to read pages from it until Unpin. Answered by StateDone."""

    id: str
    path: str


class AskStats(msgspec.Struct, frozen=True, tag=True):
    """Request the engine's statistics. Answered by Stats with the same id."""

    id: int


class AskPageStates(msgspec.Struct, frozen=True, tag=True):
    """Request the state of every page. Answered by PageStates with the same id."""

    id: int


class ResetCache(msgspec.Struct, frozen=True, tag=True):
    """Evict all cached pages. Answered by CacheReset with the same id."""

    id: int


class WatchPages(msgspec.Struct, frozen=True, tag=True):
    """Publish the pages of the cache from now on. Answered by Pages with all of them, then after each step.

    Attributes:
        with_content: whether to publish the content of pages that are gained from now on.
        with_serving: whether to serve the pages to other engines too.
    """

    with_content: bool = False
    with_serving: bool = True


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress of loading, in bytes of weights."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded; requests can be served."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Loading failed, or a state's file could not be written or read.

    Attributes:
        error: the name of a class in errors.py.
        message: one line.
    """

    error: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> "Failed":
        """Return the message for an error (see errors.to_line)."""
        return cls(*errors.to_line(error))

    def exception(self) -> Exception:
        return errors.from_line(self.error, self.message)


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """The engine will be ended by whoever runs it: its requests should continue elsewhere, and none be sent to it."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Sent every HEARTBEAT seconds by a separate thread of an engine process, even while a step runs.

    Attributes:
        step_seconds: duration of the current step so far, including the messages handled before it; 0 while idle.
        rows: number of tokens that the backend is computing; 0 while Python code runs, such as scheduling.
        slowest_seconds, slowest_rows: duration and number of tokens of the slowest computation so far.
        seconds_per_token: measured time to compute a token of a prompt; 0 if unknown.
        seconds_per_fetched_token: expected time to fetch the pages of many tokens from another engine, by token.
    """

    step_seconds: float = 0.0
    rows: int = 0
    slowest_seconds: float = 0.0
    slowest_rows: int = 1
    seconds_per_token: float = 0.0
    seconds_per_fetched_token: float = 0.0


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """The outputs of one step.

    Attributes:
        trace: the engine's events since the message before; see EngineTrace.
        events: what has happened to traced requests since then.
    """

    outputs: list[TokenOutput]
    trace: bytes = b""
    events: list[RequestEvent] = []


class Stats(msgspec.Struct, frozen=True, tag=True):
    id: int
    stats: EngineStats


class PageStates(msgspec.Struct, frozen=True, tag=True):
    """The answer to AskPageStates.

    Attributes:
        states: a byte for each page, see octavo.kv.page_map.PageState.
    """

    id: int
    states: bytes


class CacheReset(msgspec.Struct, frozen=True, tag=True):
    """The answer to ResetCache: whether the pages were evicted, which is impossible while requests use some."""

    id: int
    done: bool


class StateDone(msgspec.Struct, frozen=True, tag=True):
    """The answer to SaveState and LoadState. `failed` is None on success."""

    id: str
    failed: Failed | None = None


class Pages(msgspec.Struct, frozen=True, tag=True):
    """Full pages that the engine's cache has gained and lost since the message before.

    Attributes:
        number: 0 for the answer to WatchPages, which has all full pages; then 1 more with each message. After a gap,
            the frontend sends WatchPages again.
        gained, lost: concatenated keys, of KEY_BYTES each.
        parents, roots, tokens: if requested, for each gained page, or the first ones, the key of the page before it,
            the root of its sequence, and its token ids (int32). The key before a sequence's first page is zero, and so
            is the root of sequences without a tenant, salt and origin.
        port: where the engine serves its pages to other engines, in the answer to WatchPages; 0 if it does not.
    """

    number: int
    gained: bytes = b""
    lost: bytes = b""
    parents: bytes = b""
    roots: bytes = b""
    tokens: bytes = b""
    port: int = 0


ToEngine = (
    Load | Submit | Abort | AskStats | AskPageStates | Pin | Unpin | SaveState | LoadState | WatchPages | ResetCache
)
FromEngine = Loading | Ready | Failed | Alive | Tokens | Stats | StateDone | Pages | PageStates | CacheReset | Leaving

HEARTBEAT = 0.5  # seconds between Alive messages
_LENGTH_BYTES = 4

encode = msgspec.msgpack.Encoder().encode
_decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def frame(message: ToEngine | FromEngine) -> bytes:
    """Encode a message for a byte stream. Raises TypeError, ValueError or OverflowError if it cannot be encoded."""
    encoded = encode(message)
    return len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded


class FrameReader:
    """Splits a byte stream into the payloads of its frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add `data`, and yield the payloads that are complete now."""
        self._buffer += data
        start = 0
        while len(self._buffer) >= start + _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            end = body + int.from_bytes(self._buffer[start:body], "little")
            if len(self._buffer) < end:
                break
            yield bytes(self._buffer[body:end])
            start = end
        del self._buffer[:start]


def decode_to_engine(payload: bytes) -> tuple[ToEngine | None, list[TokenOutput]]:
    """Decode a message. Return it, and an error output for each of its requests that cannot be decoded.

    Thus an invalid request fails alone, and the other requests of its message are served.
    """
    try:
        return _decode_to_engine(payload), []
    except (msgspec.DecodeError, ValueError) as error:
        raw = msgspec.msgpack.decode(payload)
        if not isinstance(raw, dict) or raw.get("type") != "Submit":
            raise
        requests, failures = [], []
        for item in raw.get("requests", []):
            try:
                requests.append(msgspec.convert(item, EngineRequest))
            except (msgspec.ValidationError, ValueError) as problem:
                id = item[0] if isinstance(item, list) and item and isinstance(item[0], str) else ""
                failures.append(TokenOutput(id, -1, "error", message=f"the engine cannot read the request: {problem}"))
        if not failures:
            raise error
        return Submit(requests), failures
