"""LowPrioritySlots: how many requests of batches run beside those of clients."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from octavo.server.edge.traffic import Traffic

BESIDE_CLIENTS = 1  # requests of batches that run while clients wait for answers
ABORT_SECONDS = 0.05  # of traffic after which surplus requests are aborted; a shorter request does not disturb them
IDLE_SECONDS = 0.5  # without traffic after which all slots are used again

T = TypeVar("T")


class LowPrioritySlots:
    """Runs up to `count` requests while there is no traffic of clients, otherwise BESIDE_CLIENTS.

    When traffic begins, the newest requests are aborted, and repeated later: the prefix cache has their pages, and the
    answers are the same. The oldest one always goes on, so that a batch advances under any load.
    """

    def __init__(self, count: int, traffic: Traffic):
        self._count = count
        self._traffic = traffic
        self._limit = count
        self._running: dict[asyncio.Task[object], None] = {}
        self._aborted: set[asyncio.Task[object]] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._idle: asyncio.TimerHandle | None = None
        self._abort: asyncio.TimerHandle | None = None
        traffic.on_change = self._changed

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Wait for a slot, then run `work` and return its result. `work` may be cancelled and called again."""
        while True:
            while len(self._running) >= self._limit:
                future = asyncio.get_running_loop().create_future()
                self._waiting.append(future)
                try:
                    await future
                except asyncio.CancelledError:
                    with contextlib.suppress(ValueError):
                        self._waiting.remove(future)
                    self._wake()
                    raise
            task = asyncio.ensure_future(work())
            self._running[task] = None
            try:
                result = await task
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if task not in self._aborted or (current is not None and current.cancelling()):
                    raise
            else:
                return result
            finally:
                self._running.pop(task, None)
                self._aborted.discard(task)
                self._wake()

    def _changed(self) -> None:
        if self._traffic.count:
            _cancel(self._idle)
            self._idle = None
            self._limit = BESIDE_CLIENTS
            if self._abort is None and len(self._running) > self._limit:
                self._abort = asyncio.get_running_loop().call_later(ABORT_SECONDS, self._abort_surplus)
        else:
            _cancel(self._abort)
            self._abort = None
            if self._idle is None and self._limit < self._count:
                self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._use_all)

    def _abort_surplus(self) -> None:
        self._abort = None
        for task in list(self._running)[self._limit :]:
            self._aborted.add(task)
            task.cancel()

    def _use_all(self) -> None:
        self._idle = None
        self._limit = self._count
        self._wake()

    def _wake(self) -> None:
        free = self._limit - len(self._running)
        while self._waiting and free > 0:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                free -= 1


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
