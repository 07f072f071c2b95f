"""Shared: a value that is computed for all who ask at about the same time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """A value that is computed when somebody asks, but at most once in a period.

    Args:
        compute: computes the value.
        period: seconds for which a value is given again.
    """

    def __init__(self, compute: Callable[[], Awaitable[T]], period: float):
        self._compute, self._period = compute, period
        self._lock = asyncio.Lock()
        self._latest: tuple[float, T] | None = None

    async def get(self) -> T:
        """Return the value. Raises what `compute` raises."""
        async with self._lock:
            loop = asyncio.get_running_loop()
            if self._latest is None or loop.time() - self._latest[0] >= self._period:
                value = await self._compute()
                self._latest = loop.time(), value
            return self._latest[1]
