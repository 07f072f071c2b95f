"""Inbox: from callbacks to a task, with one wake-up for all that has come."""

import asyncio
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """What callbacks on the loop put in, for one task to take out: unlike from an asyncio.Queue, all of it at once.

    So what a step of the engine brings is one wake-up, and a reader that is slow catches up in one go.
    """

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._wake()

    def fail(self, error: Exception) -> None:
        """`take` raises `error` when all that came before it has been taken."""
        self._error = error
        self._wake()

    async def take(self) -> list[Item]:
        """All that has come since the last time, in order; waits until there is something."""
        if not self._items and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if not self._items and self._error is not None:
            raise self._error
        items, self._items = self._items, []
        return items

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
