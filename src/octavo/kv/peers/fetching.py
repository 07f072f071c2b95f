"""Peers: what other engines have, as the frontend says, and pages from them."""

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from octavo.address import Address
from octavo.errors import ConfigError

from . import MAX_KEYS, NUMBER_BYTES
from .access import PeerAccess

if TYPE_CHECKING:
    import zmq

PATIENCE = 0.5  # seconds for an engine to accept a connection, and from one page to the next
PAUSE = 5.0  # seconds for which a lost engine is not asked
_MAX_EXPECTED = 65_536  # pages
_MAX_CONNECTIONS = 64


class Peers:
    """Fetches pages from other engines. One that does not answer is left alone for a while.

    `expect` is for the engine's thread, `fetch` and `disconnect` are for a thread that may wait, and `holder` for any.

    Args:
        max_value: bytes that a value may take.
    """

    def __init__(self, access: PeerAccess, max_value: int):
        self._access, self._max_value = access, max_value
        self._lock = Lock()
        self._holders: OrderedDict[bytes, str] = OrderedDict()  # addresses by keys, the latest last
        self._lost: dict[str, float] = {}  # time.monotonic() until which an engine is left alone
        self._numbers = itertools.count(1)
        self._context: zmq.Context[Any] | None = None
        self._sockets: OrderedDict[str, zmq.Socket[bytes]] = OrderedDict()  # the last used one last

    def expect(self, address: str, keys: Sequence[bytes]) -> None:
        """Note that the engine at an address has the pages with these keys. What is no address by number is ignored."""
        try:
            if not Address.of(address).is_number:  # a name would have to be looked up
                return
        except ConfigError:
            return
        with self._lock:
            for key in keys:
                self._holders[key] = address
                self._holders.move_to_end(key)
            while len(self._holders) > _MAX_EXPECTED:
                self._holders.popitem(last=False)

    def holder(self, key: bytes) -> str | None:
        """Return the address of an engine that has a page and can be asked; None if none is known."""
        address = self._holders.get(key)
        return None if address is None or time.monotonic() < self._lost.get(address, 0.0) else address

    def fetch(self, address: str, keys: Sequence[bytes]) -> Iterator[memoryview]:
        """Yield the values of pages, up to the first that the engine at `address` does not have, or does not send.

        It is not expected to have the others any more. A value is valid until the next one.
        """
        import zmq

        arrived = 0
        try:
            for at in range(0, len(keys), MAX_KEYS):
                for value in self._answers(self._connected(address), keys[at : at + MAX_KEYS]):
                    arrived += 1
                    yield value
                if arrived < min(at + MAX_KEYS, len(keys)):
                    break
        except (zmq.ZMQError, TimeoutError):
            self._lose(address)
        with self._lock:
            for key in keys[arrived:]:
                self._holders.pop(key, None)

    def disconnect(self) -> None:
        """Close all connections."""
        for socket in self._sockets.values():
            socket.close()
        self._sockets.clear()
        if self._context is not None:
            self._context.term()
            self._context = None

    def _answers(self, socket: "zmq.Socket[bytes]", keys: Sequence[bytes]) -> Iterator[memoryview]:
        """Yield the values of pages, up to the first that is missing. Raises TimeoutError, ZMQError."""
        import zmq

        if not socket.poll(round(PATIENCE * 1000), zmq.POLLOUT):
            raise TimeoutError
        number = next(self._numbers).to_bytes(NUMBER_BYTES, "little")
        socket.send_multipart((number, b"".join(keys)), zmq.NOBLOCK)
        for _ in keys:
            if not len(value := self._next(socket, number)):
                return
            yield value

    def _next(self, socket: "zmq.Socket[bytes]", number: bytes) -> memoryview:
        """Return the next value that answers question `number`. Raises TimeoutError, ZMQError."""
        deadline = time.monotonic() + PATIENCE
        while socket.poll(round(1000 * max(0.0, deadline - time.monotonic()))):
            frames = socket.recv_multipart(copy=False)
            if len(frames) == 2 and frames[0].bytes == number:  # otherwise it answers a question that was given up
                return frames[1].buffer
        raise TimeoutError

    def _connected(self, address: str) -> "zmq.Socket[bytes]":
        """Return a socket that is connected to an engine, or will be. Raises ZMQError."""
        import zmq

        from octavo.curve import OVERHEAD, Curve

        if address in self._sockets:
            self._sockets.move_to_end(address)
            return self._sockets[address]
        if len(self._sockets) >= _MAX_CONNECTIONS:
            self._sockets.popitem(last=False)[1].close()
        if self._context is None:
            self._context = zmq.Context()
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        socket.linger, socket.immediate, socket.ipv6 = 0, True, True
        socket.maxmsgsize, socket.rcvhwm = self._max_value + OVERHEAD, MAX_KEYS
        Curve.of(self._access.secret).connect_as_engine(socket)
        self._sockets[address] = socket
        socket.connect(address)
        return socket

    def _lose(self, address: str) -> None:
        if (socket := self._sockets.pop(address, None)) is not None:
            socket.close()
        now = time.monotonic()
        self._lost = {other: until for other, until in self._lost.items() if until > now} | {address: now + PAUSE}
