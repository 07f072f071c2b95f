"""RespConnection: one connection to a Redis or Valkey, over its protocol RESP 2.

It reads values straight into one buffer. So pages of 0.3 to 4 MB arrive at 0.5 to 1 GB/s with 0.2 to 0.3 s of
processor time per GB; the package redis takes 1.7 to 2.5 s per GB, which steps would miss (docs/kv_store.md).
"""

import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress

from .address import RedisAddress

_CHUNK = 65536  # bytes that are sent at a time, and read where no value is expected
_UNSENT = 2 * _CHUNK  # bytes that the kernel may hold before it sends them
_LONGEST_LINE = 4096

Reply = int | bytes | memoryview | None


class RespError(Exception):
    """An error that the server answered."""


class ProtocolError(OSError):
    """The server does not speak RESP, or answered what nobody asked for."""


class RespConnection:
    """A connection on which commands are sent and replies are read. Not thread-safe.

    Args:
        timeout: seconds in which the server must connect, continue to take a command, or continue to answer.
        largest: maximum size of a value in bytes.

    Raises:
        OSError: it cannot be reached.
        RespError: it refuses the credentials or the database.
    """

    def __init__(self, address: RedisAddress, timeout: float, largest: int):
        self._socket, self._timeout = _connect(address, timeout), timeout
        self._buffer, self._start, self._end = bytearray(_CHUNK), 0, 0
        self._view, self._largest = memoryview(self._buffer), largest
        self._value = memoryview(bytearray(0))
        try:
            self._introduce(address)
        except BaseException:
            self.close()
            raise

    @property
    def is_fresh(self) -> bool:
        """Return whether the server has neither closed the connection nor sent what nobody asked for."""
        if self._start < self._end:
            return False
        self._socket.setblocking(False)
        try:
            self._socket.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        finally:
            with suppress(OSError):
                self._socket.settimeout(self._timeout)
        return False

    def send(self, *commands: Sequence[bytes]) -> None:
        """Send commands, each a list of words. Their replies must be read in the same order."""
        self._send(b"".join(map(_encoded, commands)))

    def send_value(self, before: Sequence[bytes], value: memoryview, after: Sequence[bytes]) -> None:
        """Send one command with a long value between its other words, without copying the value."""
        head = b"*%d\r\n" % (len(before) + 1 + len(after)) + b"".join(map(_word, before))
        self._send(head + b"$%d\r\n" % value.nbytes)
        self._send(value)
        self._send(b"\r\n" + b"".join(map(_word, after)))

    def reply(self) -> Reply:
        """Return the next reply; a value is valid until the next call. Raises RespError, or OSError."""
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            raise RespError(rest.decode("utf-8", "replace"))
        if kind == b":":
            return _number(rest)
        if kind == b"$":
            return self._bulk(_number(rest))
        raise ProtocolError("it does not speak the protocol of Redis")

    def array(self) -> int:
        """Return the length of the array that comes next; its items follow as replies. Raises RespError, or OSError."""
        line = self._line()
        if line[:1] == b"-":
            raise RespError(line[1:].decode("utf-8", "replace"))
        if line[:1] != b"*":
            raise ProtocolError("it does not speak the protocol of Redis")
        return _number(line[1:])

    def close(self) -> None:
        """Close the connection. From any thread: another one that waits for a reply gets an OSError."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _introduce(self, address: RedisAddress) -> None:
        if address.password:
            user = [address.username.encode()] if address.username else []
            self.send([b"AUTH", *user, address.password.encode()])
            self.reply()
        if address.database:
            self.send([b"SELECT", b"%d" % address.database])
            self.reply()

    def _send(self, data: bytes | memoryview) -> None:
        """Send bytes, each part within the timeout; `sendall` would have to send all of them in it."""
        left = memoryview(data).cast("B")
        while left:
            left = left[self._socket.send(left[:_CHUNK]) :]

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            if self._end - self._start > _LONGEST_LINE:
                raise ProtocolError("it does not speak the protocol of Redis")
            self._view[: self._end - self._start] = bytes(self._view[self._start : self._end])
            self._start, self._end = 0, self._end - self._start
            self._end += self._receive(self._view[self._end :])
        line = bytes(self._view[self._start : end])
        self._start = end + 2
        return line

    def _bulk(self, size: int) -> memoryview | None:
        if size < 0:
            return None
        if size > self._largest:
            raise ProtocolError(f"it sent a value of {size} bytes")
        if len(self._value) < size + 2:
            self._value = memoryview(bytearray(size + 2))
        value = self._value[: size + 2]
        have = min(size + 2, self._end - self._start)
        value[:have] = self._view[self._start : self._start + have]
        self._start += have
        while have < size + 2:
            have += self._receive(value[have:])
        return value[:size].toreadonly()

    def _receive(self, into: memoryview) -> int:
        if not (count := self._socket.recv_into(into)):
            raise ConnectionResetError("it closed the connection")
        return count


def _connect(address: RedisAddress, timeout: float) -> socket.socket:
    if address.path:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout)
        try:
            connection.connect(address.path)
        except BaseException:
            connection.close()
            raise
        return connection
    connection = socket.create_connection((address.host, address.port), timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Little waits in the kernel, so that over a slow line `send` returns often, and a reply soon after the last part.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
    if not address.uses_tls:
        return connection
    context = ssl.create_default_context(cafile=address.ca_certs)
    if not address.checks_certificate:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(connection, server_hostname=address.host)


def _encoded(words: Sequence[bytes]) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(map(_word, words))


def _word(word: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(word), word)


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise ProtocolError("it does not speak the protocol of Redis") from None
