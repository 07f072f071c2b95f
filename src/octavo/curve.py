"""Curve: ZeroMQ's encryption and authentication (CurveZMQ), with keys that both sides derive from one shared secret.

The secret is 256 random bits. From it follow the key pair of all engines and that of all frontends. Each side proves
that it has its own private key, and accepts only the other side's public key. So whoever has the secret may connect in
any role, and nobody else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import zmq
from zmq.utils import z85

from octavo.secret import read_key

ZAP = "inproc://zeromq.zap.01"  # where ZeroMQ asks whether a client's key is allowed (RFC 27)
OVERHEAD = 64  # bytes by which encryption lengthens a frame, at most; `maxmsgsize` is a limit of the encrypted one


@dataclass(frozen=True, slots=True, repr=False)
class Curve:
    """The key pairs of engines and of frontends, in ZeroMQ's text form (Z85), and the secret from which they follow."""

    secret: bytes
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
        return cls(secret, _pair(secret, b"octavo engine"), _pair(secret, b"octavo frontend"))

    def serve(self, socket: "zmq.Socket[bytes]") -> None:
        """Make a socket of an engine accept only clients whose keys `admission` admits. Something must answer ZAP."""
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.engine
        socket.zap_domain, socket.zap_enforce_domain = b"octavo", True

    def connect(self, socket: "zmq.Socket[bytes]") -> None:
        """Make a socket of a frontend connect only to engines."""
        self._connect(socket, self.frontend)

    def connect_as_engine(self, socket: "zmq.Socket[bytes]") -> None:
        """Make a socket of an engine connect only to engines."""
        self._connect(socket, self.engine)

    def _connect(self, socket: "zmq.Socket[bytes]", own: tuple[bytes, bytes]) -> None:
        socket.curve_serverkey = self.engine[0]
        socket.curve_publickey, socket.curve_secretkey = own


def admission(question: Sequence[bytes], public_key: bytes) -> tuple[bytes, ...]:
    """Return the answer to ZeroMQ's question at ZAP: a client is admitted if it has proved to own `public_key`."""
    version, request, _, _, _, mechanism, *credentials = question
    is_admitted = mechanism == b"CURVE" and credentials == [z85.decode(public_key)]
    status = (b"200", b"OK") if is_admitted else (b"400", b"Unknown key")
    return version, request, *status, b"", b""


def _pair(secret: bytes, role: bytes) -> tuple[bytes, bytes]:
    private = z85.encode(blake2b(secret, person=role, digest_size=32).digest())
    return zmq.curve_public(private), private
