"""A store in memory that does what a test wants: it raises, hangs, forgets, or returns what nobody stored."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from octavo.config import EngineConfig
from octavo.kv.store import Store, StoreRefused


class HostileStore(Store):
    """Keeps values in `pages`, which several stores may share.

    Attributes:
        faults: by the name of a method, what is called with its first argument and its result, and returns what the
            method returns. It may raise, or wait for `gate`.
        calls: names of the methods called.
    """

    def __init__(self, pages: dict[str, bytes] | None = None):
        super().__init__(EngineConfig())
        self.pages: dict[str, bytes] = {} if pages is None else pages
        self.faults: dict[str, Callable[[Any, Any], Any]] = {}
        self.calls: list[tuple[str, Any]] = []
        self.gate = threading.Event()

    def __str__(self) -> str:
        return "a hostile store"

    def has(self, names: Sequence[str]) -> Any:
        return self._result("has", names, [name in self.pages for name in names])

    def get(self, names: Sequence[str]) -> Iterator[Any]:
        for name in names:
            yield self._result("get", name, self.pages.get(name))

    def set(self, name: str, value: memoryview, ttl: float) -> None:
        self._result("set", name, None)
        self.pages[name] = bytes(value)

    def renew(self, names: Sequence[str], ttl: float) -> Any:
        return self._result("renew", names, [name in self.pages for name in names])

    def wait(self, *_: Any) -> Any:
        """A fault: hang, until the test opens the gate."""
        self.gate.wait(30)
        raise OSError("it has hung")

    def fail(self, *_: Any) -> Any:
        raise OSError(111, "Connection refused")

    def refuse(self, *_: Any) -> Any:
        raise StoreRefused("OOM command not allowed when used memory > 'maxmemory'.")

    def _result(self, method: str, argument: Any, result: Any) -> Any:
        if argument != ["octavo:kv1:probe"]:
            self.calls.append((method, argument))
        fault = self.faults.get(method)
        return result if fault is None else fault(argument, result)
