"""The frames between a frontend and an engine over the network, and the messages around a session.

A frame is 8 bytes of a term and MessagePack. A **session** is what a frontend and an engine share from a welcome to the
end of either; its term is a random number of the engine. Frames of another term are late and are dropped. Term 0 has
the messages below. They may gain fields, but keep the present ones, so that unequal versions can tell so.
"""

import secrets
from typing import Any

import msgspec

from octavo.engine.work_record import Work
from octavo.frontend.links.link import Exit
from octavo.version import __version__

PROTOCOL = 1  # raised when the messages of sessions change; versions of Octavo must be equal anyway, for equal tokens
BEAT = 0.5  # seconds between signs of life, from both sides
SILENT_BEATS = 8  # beats without a message after which an engine gives a frontend up
MAX_MESSAGE = 256 << 20  # bytes; ZeroMQ closes connections on which a longer one arrives
MAX_QUEUED = 50_000  # messages that wait to be sent to one peer; one that takes so few is cut off
TERM_BYTES = 8
NO_TERM = bytes(TERM_BYTES)


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A frontend asks for a session.

    Attributes:
        version, protocol: of its Octavo.
        digest: the model that it expects, see ModelFiles.digest; "" for any.
    """

    version: str = __version__
    protocol: int = PROTOCOL
    digest: str = ""


class AskFiles(msgspec.Struct, frozen=True, tag=True):
    """Somebody asks for the model's small files. Answered by Files or Refused; begins no session."""

    version: str = __version__
    protocol: int = PROTOCOL


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A frontend lives.

    Attributes:
        is_open: whether it has no request on trial, see octavo.frontend.readmission.
    """

    is_open: bool = True


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """A frontend ends its session. Its requests are aborted."""


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """A session begins. `Ready` follows when the model is loaded."""

    term: bytes


class Files(msgspec.Struct, frozen=True, tag=True):
    """The answer to AskFiles.

    Attributes:
        name: the model's name in the API.
        files: see ModelFiles.
        batch: the engine's max_batch_size and max_batch_tokens.
    """

    name: str
    files: dict[str, bytes]
    batch: dict[str, int]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """There will be no session, for a reason in one line."""

    reason: str


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A session has ended: its engine has, see Exit, or this frontend was given up."""

    reason: str
    is_fault: bool = False
    alone: str | None = None
    prompts: list[str] | None = None

    @classmethod
    def of(cls, exit: Exit) -> "Ended":
        prompts = None if exit.work.prompts is None else list(exit.work.prompts)
        return cls(exit.reason, exit.is_fault, exit.work.alone, prompts)

    def exit(self) -> Exit:
        prompts = None if self.prompts is None else tuple(self.prompts)
        return Exit(self.reason, self.is_fault, Work(self.alone, prompts))


ToHost = Hello | AskFiles | Beat | Goodbye
FromHost = Welcome | Files | Refused | Ended

encode = msgspec.msgpack.Encoder().encode
_to_host = msgspec.msgpack.Decoder(ToHost).decode
_from_host = msgspec.msgpack.Decoder(FromHost).decode


class Malformed(Exception):
    """A frame is not what the protocol allows."""


def new_term() -> bytes:
    """Return the term of a new session."""
    return secrets.token_bytes(TERM_BYTES - 1) + b"\1"  # never NO_TERM


def split(frames: list[bytes]) -> tuple[bytes, bytes]:
    """Return the term and the payload of a message's frames. Raises Malformed."""
    if len(frames) != 2 or len(frames[0]) != TERM_BYTES:
        raise Malformed("a message has a term of 8 bytes and a payload")
    return frames[0], frames[1]


def to_host(payload: bytes) -> ToHost:
    """Decode a message of term 0 to an engine. Raises Malformed."""
    return _decoded(_to_host, payload)  # type: ignore[no-any-return]


def from_host(payload: bytes) -> FromHost:
    """Decode a message of term 0 to a frontend. Raises Malformed."""
    return _decoded(_from_host, payload)  # type: ignore[no-any-return]


def _decoded(decode: Any, payload: bytes) -> Any:
    try:
        return decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None


def version_problem(version: str, protocol: int) -> str | None:
    """Return why a peer with another version is refused, in the words of this side; None if it is the same."""
    if (version, protocol) == (__version__, PROTOCOL):
        return None
    theirs = version if version != __version__ else f"{version} with protocol {protocol}"
    ours = __version__ if version != __version__ else f"{__version__} with protocol {PROTOCOL}"
    return f"the engine runs Octavo {ours}, and the frontend {theirs}: install the same version on both"
