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


class AskStats(msgspec.Struct, frozen=True, tag=True):
    pass


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The answer to Load."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The other answer to Load: a class of errors.py and its message."""

    error: str
    message: str


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """What one step brought."""

    outputs: list[TokenOutput]


class Stats(msgspec.Struct, frozen=True, tag=True):
    stats: EngineStats


ToEngine = Load | Submit | Abort | AskStats
FromEngine = Ready | Failed | Tokens | Stats

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
