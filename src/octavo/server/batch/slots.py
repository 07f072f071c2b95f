"""LowPrioritySlots: how many requests of batches run beside those of clients."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from octavo.server.edge.traffic import Traffic

from .fair_places import FairPlaces

BESIDE_CLIENTS = 1  # requests of batches that run while clients wait for answers
ABORT_SECONDS = 0.05  # of traffic after which surplus requests are aborted; a shorter request does not disturb them
IDLE_SECONDS = 0.5  # without traffic after which all slots are used again

T = TypeVar("T")


class LowPrioritySlots:
    """Runs up to `count` requests while there is no traffic of clients, otherwise BESIDE_CLIENTS.

    When traffic begins, the newest requests are aborted, and repeated later: the prefix cache has their pages, and the
    answers are the same. The oldest one always goes on, so that batches advance under any load. Tenants share the slots
    evenly.
    """

    def __init__(self, count: int, traffic: Traffic):
        self._count = count
        self._traffic = traffic
        self._limit = count
        self._places = FairPlaces(count)
        self._running: dict[asyncio.Task[object], None] = {}
        self._aborted: set[asyncio.Task[object]] = set()
        self._idle: asyncio.TimerHandle | None = None
        self._abort: asyncio.TimerHandle | None = None
        traffic.on_change = self._changed

    async def run(self, tenant: str, work: Callable[[], Awaitable[T]]) -> T:
        """Wait for a slot, then run `work` and return its result. `work` may be cancelled and called again."""
        while True:
            async with self._places.place(tenant):
                task = asyncio.ensure_future(work())
                self._running[task] = None
                try:
                    return await task
                except asyncio.CancelledError:
                    current = asyncio.current_task()
                    if task not in self._aborted or (current is not None and current.cancelling()):
                        raise
                finally:
                    self._running.pop(task, None)
                    self._aborted.discard(task)

    def _changed(self) -> None:
        if self._traffic.count:
            _cancel(self._idle)
            self._idle = None
            self._set_limit(BESIDE_CLIENTS)
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
        self._set_limit(self._count)

    def _set_limit(self, limit: int) -> None:
        if limit != self._limit:
            self._limit = limit
            self._places.resize(limit)


@dataclass(frozen=True)
class TenantSlots:
    """The slots that the requests of one tenant share with those of others."""

    slots: LowPrioritySlots
    tenant: str

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Wait for a slot, then run `work` and return its result."""
        return await self.slots.run(self.tenant, work)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
