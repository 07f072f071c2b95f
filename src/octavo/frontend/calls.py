"""Calls: messages to engines that expect an answer: statistics, states of pages, resets, and files of KV states."""

import asyncio
import itertools
from typing import Any

from octavo.engine.messages import EngineStats
from octavo.errors import EngineDead, OctavoError

from .links.messages import (
    AskPageStates,
    AskStats,
    CacheReset,
    LoadState,
    PageStates,
    ResetCache,
    SaveState,
    StateDone,
    Stats,
)
from .replica import Replica


class Calls:
    """The calls that wait for an answer. A call fails with EngineDead if its engine ends."""

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._waiting: dict[tuple[Replica, int | str], asyncio.Future[Any]] = {}

    async def stats(self, replica: Replica, patience: float | None = None) -> EngineStats:
        """Return the statistics of a replica's engine. Raises EngineDead, also after `patience` seconds."""
        stats: EngineStats = await self._patiently(replica, AskStats(next(self._ids)), patience)
        return stats

    async def page_states(self, replica: Replica, patience: float | None = None) -> bytes:
        """Return the states of a replica's pages. Raises EngineDead, also after `patience` seconds."""
        states: bytes = await self._patiently(replica, AskPageStates(next(self._ids)), patience)
        return states

    async def reset_cache(self, replica: Replica) -> bool:
        """Evict the cached pages of a replica. Return False if requests use pages. Raises EngineDead."""
        message = ResetCache(next(self._ids))
        done: bool = await self._call(replica, message.id, message)
        return done

    async def run(self, replica: Replica, message: LoadState | SaveState) -> None:
        """Make a replica's engine open or write the file of a KV state. Raises EngineDead, and the engine's error."""
        await self._call(replica, message.id, message)

    def answered(self, replica: Replica, message: Stats | PageStates | StateDone | CacheReset) -> None:
        """Pass on an answer."""
        answer = self._waiting.get((replica, message.id))
        if answer is None or answer.done():
            return
        if isinstance(message, Stats):
            answer.set_result(message.stats)
        elif isinstance(message, PageStates):
            answer.set_result(message.states)
        elif isinstance(message, CacheReset):
            answer.set_result(message.done)
        elif message.failed is None:
            answer.set_result(None)
        else:
            answer.set_exception(message.failed.exception())

    def fail(self, replica: Replica, error: OctavoError) -> None:
        """End all calls of a replica whose engine has ended."""
        for (called, _), answer in self._waiting.items():
            if called is replica and not answer.done():
                answer.set_exception(error)

    async def _patiently(self, replica: Replica, message: AskStats | AskPageStates, patience: float | None) -> Any:
        try:
            async with asyncio.timeout(patience):
                return await self._call(replica, message.id, message)
        except TimeoutError:
            raise EngineDead("the engine is busy and has not answered yet") from None

    async def _call(
        self, replica: Replica, id: int | str, message: AskStats | AskPageStates | ResetCache | LoadState | SaveState
    ) -> Any:
        if not replica.is_ready:
            raise EngineDead(f"the engine {replica.status}")
        self._waiting[replica, id] = answer = asyncio.get_running_loop().create_future()
        try:
            replica.send(message)
            return await answer
        finally:
            del self._waiting[replica, id]
