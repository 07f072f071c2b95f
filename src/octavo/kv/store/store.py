"""Store: the interface of a store of KV pages that engines share.

`--kv-store package.module:ClassName` uses a subclass (docs/kv_store.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from octavo.config import EngineConfig


class StoreRefused(Exception):
    """The store works but does not take a page: it is full or read-only. It is read, and written to again later."""


class Store(ABC):
    """A store of values by name. It may lose any value at any time, since pages can be computed again.

    An engine makes one instance, `ClassName(config)`, and calls it from three threads at once, of which none computes
    steps. One calls `has`, one `get`, and one `renew` and `set`. The default `renew` calls `has`, so `has` is then
    called by two threads at a time. A method may block, raise anything, or return what was never stored: every value
    carries a checksum, or is encrypted. A request waits for at most 0.08 s from one page to the next. After an error or
    a late answer, the store is left alone for a while.

    Names are short ASCII texts. Equal names mean equal pages, whichever engine stores them. They are hashes of all
    tokens up to the end of the page, the model, the tenant and the salt, and are not worth sorting or parsing.
    """

    def __init__(self, config: EngineConfig):
        self.config = config

    def __str__(self) -> str:
        """Return what the log calls the store. By default, the name of its class."""
        return f"{type(self).__module__}:{type(self).__qualname__}"

    @abstractmethod
    def has(self, names: Sequence[str]) -> Sequence[bool]:
        """Return for each name whether the store has a value. The first of them are the first pages of a prompt."""

    @abstractmethod
    def get(self, names: Sequence[str]) -> Iterable[bytes | bytearray | memoryview | None]:
        """Yield the value of each name, or None if it is lost. A value need only stay valid until the next one."""

    @abstractmethod
    def set(self, name: str, value: memoryview, ttl: float) -> None:
        """Store a value for `ttl` seconds. The memory of `value` is used again when the method has returned.

        Raises:
            StoreRefused: the store is full or read-only.
        """

    def renew(self, names: Sequence[str], ttl: float) -> Sequence[bool]:
        """Keep values for `ttl` more seconds, and return which of them exist: those that do not are stored next.

        By default, only return which of them exist.
        """
        return self.has(names)

    def close(self) -> None:
        """Release connections. Calls in other threads may still be running; they may fail. By default, do nothing."""
        return
