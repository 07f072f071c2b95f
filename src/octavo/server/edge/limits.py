"""Limits for all connections together: their number, and the bytes of bodies that are arriving."""

from typing import Protocol

from octavo.server.errors import ApiError


class Connection(Protocol):
    """A connection that can be closed to make place for another."""

    def close_idle(self) -> None:
        """Close the connection. Called only while no request uses it."""


class ConnectionLimit:
    """Admits connections up to a maximum. A new connection beyond it closes the one that has been idle longest.

    Thus thousands of idle connections cannot keep others out.
    """

    def __init__(self, maximum: int):
        self._maximum = maximum
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # in the order in which they became idle

    def admit(self, connection: Connection) -> bool:
        """Count a new connection, which is idle. Return False if all connections are busy."""
        if len(self._open) >= self._maximum:
            longest_idle = next(iter(self._idle), None)
            if longest_idle is None:
                return False
            self.release(longest_idle)
            longest_idle.close_idle()
        self._open.add(connection)
        self._idle[connection] = None
        return True

    def set_busy(self, connection: Connection) -> None:
        """Note that a request has begun on a connection."""
        self._idle.pop(connection, None)

    def set_idle(self, connection: Connection) -> None:
        """Note that a connection waits for its next request."""
        if connection in self._open:
            self._idle[connection] = None

    def close_idle(self) -> None:
        """Close all connections that wait for a request."""
        for connection in list(self._idle):
            connection.close_idle()

    def release(self, connection: Connection) -> None:
        """Note that a connection is closed."""
        self._open.discard(connection)
        self._idle.pop(connection, None)


class ByteBudget:
    """Counts bytes that are held, up to a maximum."""

    def __init__(self, maximum: int):
        self._maximum = maximum
        self._held = 0

    def acquire(self, size: int) -> None:
        """Count `size` more bytes. Raises ApiError 503 if they would exceed the maximum."""
        if self._held + size > self._maximum:
            raise ApiError(
                503, "too many request bodies are arriving at once; try again shortly", code="too_many_bodies"
            )
        self._held += size

    def release(self, size: int) -> None:
        """Subtract bytes that were acquired."""
        self._held -= size
