"""FairPlaces: a limited number of places, shared evenly between tenants."""

import asyncio
import contextlib
import itertools
from collections import Counter, deque
from collections.abc import AsyncGenerator


class FairPlaces:
    """Gives a place that becomes free to the waiting tenant that has the fewest places; among equals, take turns.

    Args:
        limit: number of places.
        reserve: number of further places, for tenants that have none.
    """

    def __init__(self, limit: int, reserve: int = 0):
        self._limit, self._reserve = limit, reserve
        self._taken = Counter[str]()  # places by tenant
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._turns = itertools.count()
        self._last_turn: dict[str, int] = {}  # by tenant, while it has places or waits

    @property
    def taken(self) -> int:
        """Return the number of places that are taken."""
        return self._taken.total()

    def resize(self, limit: int) -> None:
        """Change the number of places. Places that are taken stay taken until they are released."""
        self._limit = limit
        self._grant()

    @contextlib.asynccontextmanager
    async def place(self, tenant: str) -> AsyncGenerator[None, None]:
        """Wait for a place, and release it afterwards."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(future)
        self._grant()
        try:
            await future
        except asyncio.CancelledError:
            if future.cancelled():
                self._leave_queue(tenant, future)
            else:
                self._release(tenant)
            raise
        try:
            yield
        finally:
            self._release(tenant)

    def _grant(self) -> None:
        while self._waiting:
            tenant = min(self._waiting, key=lambda each: (self._taken[each], self._last_turn.get(each, -1)))
            reserve = 0 if self._taken[tenant] else self._reserve
            if self.taken >= self._limit + reserve:
                return
            future = self._waiting[tenant].popleft()
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            if not future.cancelled():
                self._taken[tenant] += 1
                self._last_turn[tenant] = next(self._turns)
                future.set_result(None)

    def _leave_queue(self, tenant: str, future: "asyncio.Future[None]") -> None:
        queue = self._waiting.get(tenant, deque())
        with contextlib.suppress(ValueError):
            queue.remove(future)
        if not queue:
            self._waiting.pop(tenant, None)
        self._forget(tenant)

    def _release(self, tenant: str) -> None:
        self._taken[tenant] -= 1
        self._forget(tenant)
        self._grant()

    def _forget(self, tenant: str) -> None:
        """Forget a tenant that has no place and does not wait."""
        if not self._taken[tenant]:
            del self._taken[tenant]
            if tenant not in self._waiting:
                self._last_turn.pop(tenant, None)
