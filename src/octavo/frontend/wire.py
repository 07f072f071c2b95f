"""Messages between a frontend and an engine in another process: msgpack over one ZeroMQ pair."""

from typing import Any

import msgspec

from octavo.engine.messages import EngineInfo, EngineRequest, EngineStats, TokenOutput


class Load(msgspec.Struct, frozen=True, tag=True):
    """The first message to an engine process. `config`: the fields of EngineConfig."""

    config: dict[str, Any]
    path: str


class Submit(msgspec.Struct, frozen=True, tag=True):
    requests: list[EngineRequest]


class Abort(msgspec.Struct, frozen=True, tag=True):
    ids: list[str]


class Pin(msgspec.Struct, frozen=True, tag=True):
    """Keep the pages of a KV state."""

    id: str
    tokens: list[int]
    tenant: str
    salt: str
    origin: str = ""


class Unpin(msgspec.Struct, frozen=True, tag=True):
    """Let go of them, and of the state's file."""

    id: str


class SaveState(msgspec.Struct, frozen=True, tag=True):
    """Write a KV state to a file. Answered with StateDone, as LoadState."""

    id: str
    path: str
    tokens: list[int]
    tenant: str
    salt: str
    origin: str = ""


class LoadState(msgspec.Struct, frozen=True, tag=True):
    """Find pages in the file of a KV state from now on, until Unpin."""

    id: str
    path: str


class AskStats(msgspec.Struct, frozen=True, tag=True):
    pass


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The answer to Load."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The other answer to Load, and part of StateDone: a class of errors.py and its message."""

    error: str
    message: str


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """What one step brought."""

    outputs: list[TokenOutput]


class Stats(msgspec.Struct, frozen=True, tag=True):
    stats: EngineStats


class StateDone(msgspec.Struct, frozen=True, tag=True):
    """The answer to SaveState and LoadState; `failed`: they could not be done."""

    id: str
    failed: Failed | None = None


ToEngine = Load | Submit | Abort | AskStats | Pin | Unpin | SaveState | LoadState
FromEngine = Ready | Failed | Tokens | Stats | StateDone

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
