"""Inbox: a queue from callbacks to a task, which takes all items at once."""

import asyncio
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """A queue from callbacks on the event loop to one task. Unlike an asyncio.Queue, it returns all items at once.

    So the items of one step cost one wake-up, and a slow reader catches up at once.
    """

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Make `take` raise `error` after all earlier items were taken."""
        self._error = error
        self._wake()

    async def take(self) -> list[Item]:
        """Wait until there are items, then return all of them in order."""
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
