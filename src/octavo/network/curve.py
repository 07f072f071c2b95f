"""Curve: ZeroMQ's encryption and authentication (CurveZMQ), with keys that both sides derive from one shared secret.

The secret is 256 random bits. From it follow the key pair of all engines and that of all frontends. Each side proves
that it has its own private key, and accepts only the other side's public key. So whoever has the secret may connect in
either role, and nobody else.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import zmq
from zmq.utils import z85

from octavo.secret import read_key

from .wire import Wire

ZAP = "inproc://zeromq.zap.01"  # where ZeroMQ asks whether a client's key is allowed (RFC 27)


@dataclass(frozen=True, slots=True, repr=False)
class Curve:
    """The key pairs of engines and of frontends, in ZeroMQ's text form (Z85)."""

    engine: tuple[bytes, bytes]
    frontend: tuple[bytes, bytes]

    @classmethod
    def read(cls, source: str | None) -> "Curve | None":
        """Return the keys of the secret that `secret_file` names; None without one. Raises ConfigError."""
        secret = read_key("secret_file", source)
        return None if secret is None else cls.of(bytes.fromhex(secret))

    @classmethod
    def of(cls, secret: bytes) -> "Curve":
        """Return the keys that follow from a secret."""
        return cls(_pair(secret, b"octavo engine"), _pair(secret, b"octavo frontend"))

    def serve(self, socket: "zmq.Socket[bytes]") -> None:
        """Make a socket of an engine accept only frontends. Its context needs a Doorkeeper."""
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.engine
        socket.zap_domain = b"octavo"

    def connect(self, socket: "zmq.Socket[bytes]") -> None:
        """Make a socket of a frontend connect only to engines."""
        socket.curve_serverkey = self.engine[0]
        socket.curve_publickey, socket.curve_secretkey = self.frontend


class Doorkeeper:
    """Answers ZeroMQ's questions whether those who connect to a context's sockets are frontends."""

    def __init__(self, context: "zmq.Context[Any]", curve: Curve):
        self._allowed = z85.decode(curve.frontend[0])
        socket = context.socket(zmq.REP)
        socket.linger = 0
        socket.bind(ZAP)
        self._wire = Wire(socket, self._answer)

    def close(self) -> None:
        self._wire.close()

    def _answer(self, frames: list[bytes]) -> None:
        version, request, _, _, _, mechanism, *credentials = frames
        is_allowed = mechanism == b"CURVE" and credentials == [self._allowed]
        status = (b"200", b"OK") if is_allowed else (b"400", b"Unknown key")
        self._wire.send((version, request, *status, b"", b""))


def _pair(secret: bytes, role: bytes) -> tuple[bytes, bytes]:
    private = z85.encode(blake2b(secret, person=role, digest_size=32).digest())
    return zmq.curve_public(private), private
