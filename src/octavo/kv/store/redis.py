"""RedisStore: pages in a Redis or a Valkey."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from octavo.config import EngineConfig

from .address import RedisAddress
from .resp import ProtocolError, RespConnection, RespError
from .store import Store, StoreRefused

TIMEOUT = 1.0  # seconds without progress after which a connection is given up
LARGEST = 2**28  # bytes of a value; more than any page has


class RedisStore(Store):
    """A Store over as many connections as there are threads that use it.

    Args:
        config: names the URL.

    Raises:
        ConfigError: the URL is malformed. Whether anything listens there is not checked.
    """

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self.address = RedisAddress.parse(config.kv_store or "")
        self._lock = Lock()
        self._idle: list[RespConnection] = []
        self._used: set[RespConnection] = set()
        self._is_closed = False

    def __str__(self) -> str:
        return self.address.shown

    def has(self, names: Sequence[str]) -> list[bool]:
        with self._connection() as connection:
            connection.send(*([b"EXISTS", name.encode()] for name in names))
            return [bool(reply) for reply in _replies(connection, len(names))]

    def get(self, names: Sequence[str]) -> Iterator[memoryview | None]:
        with self._connection() as connection:
            connection.send([b"MGET", *(name.encode() for name in names)])
            if connection.array() != len(names):
                raise ProtocolError("it answered MGET with another number of values")
            for _ in names:
                value = connection.reply()
                yield value if isinstance(value, memoryview) else None

    def set(self, name: str, value: memoryview, ttl: float) -> None:
        with self._connection() as connection, _refusals():
            connection.send_value([b"SET", name.encode()], value, [b"PX", _milliseconds(ttl)])
            list(_replies(connection, 1))

    def renew(self, names: Sequence[str], ttl: float) -> list[bool]:
        with self._connection() as connection, _refusals():
            connection.send(*([b"PEXPIRE", name.encode(), _milliseconds(ttl)] for name in names))
            return [bool(reply) for reply in _replies(connection, len(names))]

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            connections = [*self._idle, *self._used]
        for connection in connections:
            connection.close()

    @contextmanager
    def _connection(self) -> Iterator[RespConnection]:
        """Lend a connection, which is closed unless the replies of all commands have been read."""
        connection = self._take() or RespConnection(self.address, TIMEOUT, LARGEST)
        with self._lock:
            self._used.add(connection)
        is_whole = False
        try:
            yield connection
            is_whole = True
        except (RespError, StoreRefused):
            is_whole = True
            raise
        finally:
            with self._lock:
                self._used.discard(connection)
                is_whole = is_whole and not self._is_closed
                if is_whole:
                    self._idle.append(connection)
            if not is_whole:
                connection.close()

    def _take(self) -> RespConnection | None:
        """Return an idle connection; None if there is none that the server has left open."""
        while True:
            with self._lock:
                if self._is_closed:
                    raise ConnectionAbortedError("the store is closed")
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.is_fresh:
                return connection
            connection.close()


def _replies(connection: RespConnection, count: int) -> Iterator[object]:
    """Yield the replies of `count` commands. Raises the first RespError when all have been read."""
    failure = None
    for _ in range(count):
        try:
            yield connection.reply()
        except RespError as error:
            failure = failure or error
            yield None
    if failure is not None:
        raise failure


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn an error reply to a command that writes into StoreRefused."""
    try:
        yield
    except RespError as error:
        raise StoreRefused(str(error)) from None


def _milliseconds(seconds: float) -> bytes:
    return b"%d" % max(1, round(seconds * 1000))
