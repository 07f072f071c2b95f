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
_NO_PROOF = bytes(_PROOF)  # the answer to another secret
_LONGEST = 1 << 20  # bytes of a message
_LENGTH = struct.Struct("<I")
HANDSHAKE = 5.0  # seconds in which a connection must prove that it has the secret and say what it is for
LOST = 3  # seconds without any sign of the other machine's kernel after which it counts as lost
_MOST_STRANGERS = 32  # connections that are in their handshake at the same time
_QUIET = 10.0  # seconds between lines about strangers
_PAUSE = 0.1  # seconds until the next attempt to accept a connection, where one has failed

log = logging.getLogger("octavo")


class HandshakeFailed(Exception):
    """The other side is no node of Octavo, or has another secret. `str()` says which."""


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

    def receive(self, kind: Any, deadline: float | None = None) -> Any:
        """Wait for the next message. Return None if the connection ends or brings something else; see `reason`.

        Args:
            deadline: by the monotonic clock; the connection counts as ended then.
        """
        try:
            (length,) = _LENGTH.unpack(self.read(_LENGTH.size, deadline))
            if length <= _LONGEST:
                return msgspec.msgpack.decode(self.read(length, deadline), type=kind)
        except OSError as error:
            self.reason = _how_ended(error)
            return None
        except (ValueError, RecursionError):  # of decode
            pass
        self.reason = "it has sent what is no message"
        return None

    def read(self, size: int, deadline: float | None = None) -> bytearray:
        """Wait for so many bytes. Raises OSError if the connection or the time ends first."""
        content = bytearray(size)
        self.read_into(memoryview(content), deadline)
        return content

    def read_into(self, view: memoryview, deadline: float | None = None) -> None:
        """Fill a buffer. Raises OSError if the connection or the time ends first."""
        try:
            while view:
                if deadline is not None:
                    self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
                if not (count := self.socket.recv_into(view)):
                    raise ConnectionResetError("it has hung up")
                view = view[count:]
        finally:
            if deadline is not None:
                self.socket.settimeout(None)

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
    """Connect to a Listener. Raises OSError if nobody listens or it has no room, and HandshakeFailed."""
    line = Line(socket.create_connection(address, HANDSHAKE))
    try:
        _shake_hands(line, key, time.monotonic() + HANDSHAKE, accepts=False)
        return line
    except BaseException:
        line.close()
        raise


class Listener:
    """Accepts connections of those who have the secret, in threads, until it is closed.

    Strangers keep nobody out: where too many connections are in their handshake, the oldest one makes room.

    Args:
        host: a name or number of this machine.
        port: 0 for any that is free.
        first: the kinds of a connection's first message.
        on_line: called in a thread with a new connection, its first message and the other side's address.

    Raises ConfigError if it cannot listen there.
    """

    def __init__(self, host: str, port: int, key: bytes, first: Any, on_line: Callable[[Line, Any, str], None]):
        self._key, self._first, self._on_line = key, first, on_line
        self._socket = _listening(host, port, or_everywhere=bool(key))
        self.port: int = self._socket.getsockname()[1]
        self._strangers: dict[Line, None] = {}  # in their handshake, the oldest first
        self._changed, self._closed = threading.Condition(), threading.Event()
        self._told = float("-inf")
        threading.Thread(target=self._accept, name="octavo-nodes", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends `accept`
        self._socket.close()
        with self._changed:
            for line in self._strangers:
                line.hang_up()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, address = self._socket.accept()
                line = Line(connection)
            except OSError:  # closed, or there are too many open files
                self._closed.wait(_PAUSE)
                continue
            with self._changed:
                if len(self._strangers) >= _MOST_STRANGERS:
                    next(iter(self._strangers)).hang_up()
                    self._changed.wait_for(lambda: len(self._strangers) < _MOST_STRANGERS)
                self._strangers[line] = None
            threading.Thread(target=self._welcome, args=(line, address[0]), daemon=True).start()

    def _welcome(self, line: Line, address: str) -> None:
        deadline = time.monotonic() + HANDSHAKE
        message = None
        try:
            _shake_hands(line, self._key, deadline, accepts=True)
            message, reason = line.receive(self._first, deadline), line.reason
        except HandshakeFailed as error:
            reason = str(error)
        except OSError as error:
            reason = _how_ended(error)
        finally:
            with self._changed:
                del self._strangers[line]
                self._changed.notify()
        if message is not None and not self._closed.is_set():
            self._on_line(line, message, address)
            return
        line.close()
        if time.monotonic() - self._told > _QUIET and not self._closed.is_set():
            self._told = time.monotonic()
            log.warning("a connection from %s was refused: %s", address, reason)


def _how_ended(error: OSError) -> str:
    """Say in words why a connection has ended."""
    if error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH):
        return "its machine does not answer"
    return "it is silent, or too slow" if isinstance(error, TimeoutError) else "it has hung up"


def _listening(host: str, port: int, or_everywhere: bool) -> socket.socket:
    """Return a socket that listens on the first address of a host that this machine has.

    Args:
        or_everywhere: if it has none of them, listen on all that it has: the host may be a balancer in front of it.
    """
    try:
        for family, _, _, _, address in _addresses(host, port):
            try:
                return socket.create_server(address[:2], family=family)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                missing = error
        if not or_everywhere:
            raise missing
        return socket.create_server(("", port))
    except OSError as error:
        what = "in use: stop the program that uses it, or choose another --master-port"
        said = what if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror or error})"
        raise ConfigError(f"port {port} for the other nodes is {said}") from None


def _addresses(host: str, port: int) -> Iterable[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"master_addr {host} is unknown ({error.strerror or error})") from None


def _shake_hands(line: Line, key: bytes, deadline: float, accepts: bool) -> None:
    """Raise HandshakeFailed unless the other side proves that it has the key; OSError if it is silent or hangs up."""
    mine = os.urandom(_RANDOM)
    if not accepts:  # whoever connects speaks first, and proves first
        line.socket.sendall(_HELLO + mine)
    hello = bytes(line.read(len(_HELLO) + _RANDOM, deadline))
    if not hello.startswith(_HELLO):
        raise HandshakeFailed("it is no node of Octavo, or of another version")
    theirs = hello[len(_HELLO) :]
    numbers = theirs + mine if accepts else mine + theirs

    def proof(role: bytes) -> bytes:
        return blake2b(numbers, key=key, person=role, digest_size=_PROOF).digest()

    line.socket.sendall(_HELLO + mine if accepts else proof(_CONNECTS))
    is_proven = hmac.compare_digest(line.read(_PROOF, deadline), proof(_CONNECTS if accepts else _ACCEPTS))
    if accepts:
        line.socket.sendall(proof(_ACCEPTS) if is_proven else _NO_PROOF)
    if not is_proven:
        raise HandshakeFailed("it has another secret, or none; give all nodes the same --secret-file")
