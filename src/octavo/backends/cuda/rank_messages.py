"""What rank 0 tells the other ranks of its machine, once they have joined: over stream sockets, in order.

Two sockets lead to each rank: one for the steps, and one for its KV pages, of which other threads may ask meanwhile.
"""

import contextlib
import socket
import struct
from typing import Any

import msgspec
import numpy as np

from octavo.backends.base import StepBatch

_LENGTH = struct.Struct("<Q")


class Step(msgspec.Struct, frozen=True, tag=True):
    """Launch a step.

    Attributes:
        only_logits: sample nothing.
    """

    batch: StepBatch
    only_logits: bool = False


class Capture(msgspec.Struct, frozen=True, tag=True):
    """Capture a CUDA graph; see CudaBackend.capture."""

    number: int


class Copy(msgspec.Struct, frozen=True, tag=True):
    """Copy a page after the steps so far, and answer."""

    source: int
    target: int


class Read(msgspec.Struct, frozen=True, tag=True):
    """Answer with a page's content."""

    page: int


class Write(msgspec.Struct, frozen=True, tag=True):
    """Replace a page's content, and answer."""

    page: int
    content: bytes


ToRank = Step | Capture | Copy | Read | Write


class Stream:
    """One end of a stream socket that carries messages, with their length before them. Raises OSError."""

    def __init__(self, end: socket.socket):
        self._socket = end

    def send(self, content: bytes) -> None:
        self._socket.sendall(_LENGTH.pack(len(content)) + content)

    def receive(self) -> bytearray:
        """Return the next message. Raises ConnectionResetError if the other end is closed."""
        [length] = _LENGTH.unpack(self._read(_LENGTH.size))
        return self._read(length)

    def hang_up(self) -> None:
        """End the connection for both sides, and for a thread of this process that waits for a message."""
        with contextlib.suppress(OSError):  # the other side has closed it
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _read(self, size: int) -> bytearray:
        content = bytearray(size)
        rest = memoryview(content)
        while rest:
            count = self._socket.recv_into(rest)
            if not count:
                raise ConnectionResetError("the other rank has ended")
            rest = rest[count:]
        return content


def encode(message: ToRank) -> bytes:
    return _encoder.encode(message)


def decode(content: bytes | bytearray) -> ToRank:
    message: ToRank = _decoder.decode(content)
    return message


def _from_array(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise NotImplementedError
    return value.dtype.str, value.shape, np.ascontiguousarray(value).data.cast("B") if value.size else b""


def _to_array(kind: type, value: Any) -> Any:
    type_name, shape, content = value
    return np.frombuffer(content, type_name).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_from_array)
_decoder = msgspec.msgpack.Decoder(ToRank, dec_hook=_to_array)
