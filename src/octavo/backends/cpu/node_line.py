"""Line: a TCP connection between two nodes (machines) that have proved to each other that they have the same secret.

Both sides send a random number. Each then sends a keyed hash (BLAKE2b) of both numbers and its role, so neither sends
the secret, and nothing can be replayed. What follows is neither encrypted nor signed: the network must be trusted.
"""

import contextlib
import errno
import hmac
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import Any

import msgspec

from octavo.errors import ConfigError

_HELLO = b"octavo ranks 1\r\n"  # the protocol and its number
_RANDOM, _PROOF = 32, 32  # bytes
_ACCEPTS, _CONNECTS = b"accepts", b"connects"
_LONGEST = 1 << 20  # bytes of a message
_LENGTH = struct.Struct("<I")
HANDSHAKE = 5.0  # seconds in which a connection must prove that it has the secret and say what it is for
LOST = 3  # seconds without any sign of the other machine's kernel after which it counts as lost
_MOST_STRANGERS = 32  # connections that are in their handshake at the same time
_QUIET = 10.0  # seconds between lines about strangers

log = logging.getLogger("octavo")


class HandshakeFailed(Exception):
    """The other side is no node of Octavo, has another secret, or has hung up. `str()` says which."""


class Line:
    """An open connection whose handshake is done. One thread may send while another receives."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.reason = "it has hung up"  # why the connection has ended, if it has
        self._sending = threading.Lock()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def watch(self) -> None:
        """Let the connection end when the other machine's kernel gives no sign of life for LOST seconds.

        Not for large messages: it ends too if they are not read for so long.
        """
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, 1),
            (socket.TCP_KEEPINTVL, 1),
            (socket.TCP_KEEPCNT, LOST),
            (socket.TCP_USER_TIMEOUT, 1000 * LOST),
        ):
            self.socket.setsockopt(socket.IPPROTO_TCP, option, value)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """Send a message. Raises OSError if the connection has ended."""
        content = msgspec.msgpack.encode(message)
        with self._sending:
            self.socket.sendall(_LENGTH.pack(len(content)) + content)

    def receive(self, kind: Any) -> Any:
        """Wait for the next message. Return None if the connection has ended. Raises msgspec.DecodeError."""
        try:
            (length,) = _LENGTH.unpack(self.read(_LENGTH.size))
            return msgspec.msgpack.decode(self.read(min(length, _LONGEST)), type=kind)
        except OSError as error:
            if error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH):
                self.reason = "its machine does not answer"
            return None

    def read(self, size: int) -> bytearray:
        """Wait for so many bytes. Raises OSError if the connection ends first."""
        content = bytearray(size)
        self.read_into(memoryview(content))
        return content

    def read_into(self, view: memoryview) -> None:
        """Fill a buffer. Raises OSError if the connection ends first."""
        while view:
            if not (count := self.socket.recv_into(view)):
                raise ConnectionResetError(errno.ECONNRESET, "the connection has ended")
            view = view[count:]

    @property
    def has_ended(self) -> bool:
        """Return whether the other side has hung up, while it has nothing to say."""
        try:
            return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def hang_up(self) -> None:
        """End the connection, for both sides and for whoever waits for it."""
        with contextlib.suppress(OSError):  # it has ended already
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self.socket.close()


def connect(address: tuple[str, int], key: bytes) -> Line:
    """Connect to a Listener. Raises OSError if nobody listens, and HandshakeFailed."""
    connection = socket.create_connection(address, HANDSHAKE)
    try:
        _shake_hands(connection, key, accepts=False)
        return Line(connection)
    except BaseException:
        connection.close()
        raise


class Listener:
    """Accepts connections of those who have the secret, in threads, until it is closed.

    Args:
        host: a name or number of this machine; "" for all that it has.
        port: 0 for any that is free.
        first: the kinds of a connection's first message.
        on_line: called in a thread with a new connection, its first message and the other side's address.

    Raises ConfigError if it cannot listen there.
    """

    def __init__(self, host: str, port: int, key: bytes, first: Any, on_line: Callable[[Line, Any, str], None]):
        self._key, self._first, self._on_line = key, first, on_line
        self._socket = _listening(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._free, self._told = threading.BoundedSemaphore(_MOST_STRANGERS), float("-inf")
        threading.Thread(target=self._accept, name="octavo-nodes", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends `accept`
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, address = self._socket.accept()
                if self._free.acquire(blocking=False):
                    threading.Thread(target=self._welcome, args=(connection, address[0]), daemon=True).start()
                else:
                    connection.close()

    def _welcome(self, connection: socket.socket, address: str) -> None:
        try:
            connection.settimeout(HANDSHAKE)
            _shake_hands(connection, self._key, accepts=True)
            line = Line(connection)
            connection.settimeout(HANDSHAKE)
            message = line.receive(self._first)
            connection.settimeout(None)
            if message is None:
                raise HandshakeFailed("it has hung up")
            self._on_line(line, message, address)
        except (OSError, HandshakeFailed, msgspec.DecodeError) as error:
            connection.close()
            if time.monotonic() - self._told > _QUIET:
                self._told = time.monotonic()
                log.warning("a connection from %s was refused: %s", address, error)
        finally:
            self._free.release()


def _listening(host: str, port: int) -> socket.socket:
    """Return a listening socket. A name that stands for another machine, such as a balancer, means all addresses."""
    try:
        for family, _, _, _, address in _addresses(host, port):
            try:
                return socket.create_server(address[:2], family=family)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
        return socket.create_server(("", port))
    except OSError as error:
        what = "in use: stop the program that uses it, or choose another --master-port"
        reason = what if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror or error})"
        raise ConfigError(f"port {port} for the other nodes is {reason}") from None


def _addresses(host: str, port: int) -> Iterable[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE) if host else []
    except OSError as error:
        raise ConfigError(f"master_addr {host} is unknown ({error.strerror or error})") from None


def _shake_hands(connection: socket.socket, key: bytes, accepts: bool) -> None:
    """Raise HandshakeFailed unless the other side proves in time that it has the key; OSError if it is silent."""
    deadline = time.monotonic() + HANDSHAKE
    mine = os.urandom(_RANDOM)
    connection.sendall(_HELLO + mine)
    hello = _read(connection, len(_HELLO) + _RANDOM, deadline) or b""
    if not hello.startswith(_HELLO):
        raise HandshakeFailed("it is no node of Octavo, or of another version")
    theirs = hello[len(_HELLO) :]
    numbers = theirs + mine if accepts else mine + theirs

    def proof(role: bytes) -> bytes:
        return blake2b(numbers, key=key, person=role, digest_size=_PROOF).digest()

    if not accepts:  # whoever connects proves it first
        connection.sendall(proof(_CONNECTS))
    proven = _read(connection, _PROOF, deadline)
    if proven is None or not hmac.compare_digest(proven, proof(_CONNECTS if accepts else _ACCEPTS)):
        raise HandshakeFailed("it has another secret, or none; give all nodes the same --secret-file")
    if accepts:
        connection.sendall(proof(_ACCEPTS))


def _read(connection: socket.socket, size: int, deadline: float) -> bytes | None:
    """Return so many bytes; None if the other side hangs up first. Raises OSError after the deadline."""
    content = b""
    while len(content) < size:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        if not (more := connection.recv(size - len(content))):
            return None
        content += more
    return content
