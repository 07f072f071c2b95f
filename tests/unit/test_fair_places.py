"""How requests and batches share their places between tenants."""

import asyncio
from collections import Counter

import pytest

from octavo.server.batch.fair_places import FairPlaces
from octavo.server.batch.slots import BESIDE_CLIENTS, LowPrioritySlots
from octavo.server.edge.traffic import Traffic


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Holder:
    """Takes places, and releases them on demand."""

    def __init__(self, places: FairPlaces):
        self.places, self.held, self.tasks = places, list[str](), list[asyncio.Task[None]]()
        self._release = dict[str, asyncio.Event]()

    async def take(self, *names: str) -> None:
        """Take a place for each name; the tenant is its first letter."""
        for name in names:
            self.tasks.append(asyncio.ensure_future(self._hold(name)))
            await settle()

    async def release(self, name: str) -> None:
        self._release[name].set()
        await settle()

    async def _hold(self, name: str) -> None:
        self._release[name] = asyncio.Event()
        async with self.places.place(name[0]):
            self.held.append(name)
            try:
                await self._release[name].wait()
            finally:
                self.held.remove(name)


def test_a_free_place_goes_to_the_tenant_with_the_fewest() -> None:
    async def use() -> None:
        holder = Holder(FairPlaces(3))
        await holder.take("a1", "a2", "a3", "a4", "a5", "b1", "b2", "c1")
        assert holder.held == ["a1", "a2", "a3"]
        await holder.release("a1")
        await holder.release("a2")
        assert holder.held == ["a3", "b1", "c1"]
        await holder.release("c1")  # each has one or none left; a has waited longer than b
        assert holder.held == ["a3", "b1", "b2"] or holder.held == ["a3", "b1", "a4"]
        for name in ("a3", "b1", "b2", "a4", "a5"):
            await holder.release(name)
        await asyncio.wait(holder.tasks, timeout=1)
        assert holder.places.taken == 0 and not holder.places._last_turn and not holder.places._taken

    asyncio.run(use())


def test_turns_with_a_single_place() -> None:
    """While clients wait there is one slot; it goes round."""

    async def use() -> list[str]:
        places, order = FairPlaces(1), list[str]()

        async def work(tenant: str) -> None:
            async with places.place(tenant):
                order.append(tenant)
                await asyncio.sleep(0)

        await asyncio.gather(*(work(tenant) for tenant in "aaaaaabbc"))
        return order

    assert "".join(asyncio.run(use())) == "abcabaaaa"


def test_a_reserve_for_tenants_that_have_none() -> None:
    async def use() -> None:
        holder = Holder(FairPlaces(2, reserve=2))
        await holder.take("a1", "a2", "a3", "b1", "c1", "d1", "b2")
        assert holder.held == ["a1", "a2", "b1", "c1"]
        await holder.release("a1")
        assert holder.held == ["a2", "b1", "c1", "d1"]
        for name in ("c1", "d1", "b1"):
            await holder.release(name)
        assert holder.held == ["a2", "b2"]
        for task in holder.tasks:
            task.cancel()

    asyncio.run(use())


@pytest.mark.parametrize("turns", range(6))
def test_cancelled_waiters_lose_no_place(turns: int) -> None:
    """Those that wait, and, after some number of the loop's turns, one that has just been given a place."""

    async def use() -> None:
        holder = Holder(FairPlaces(1))
        await holder.take("a1", "a2", "b1", "b2")
        holder.tasks[2].cancel()
        await settle()
        holder._release["a1"].set()
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in holder.tasks[1:]:
            task.cancel()
        await settle()
        assert holder.places.taken == 0
        await holder.take("c1")
        assert holder.held == ["c1"]
        await holder.release("c1")

    asyncio.run(use())


def test_slots_beside_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.server.batch.slots.ABORT_SECONDS", 0.0)
    monkeypatch.setattr("octavo.server.batch.slots.IDLE_SECONDS", 0.0)

    async def use() -> None:
        traffic = Traffic()
        slots, runs, release = LowPrioritySlots(4, traffic), Counter[str](), asyncio.Event()

        async def work(name: str) -> str:
            runs[name] += 1
            await release.wait()
            return name

        names = ["a1", "a2", "a3", "b1", "b2", "b3"]
        tasks = [asyncio.ensure_future(slots.run(name[0], lambda name=name: work(name))) for name in names]
        await settle()
        assert sum(runs.values()) == 4
        traffic.add(1)
        await asyncio.sleep(0.01)
        assert slots._places.taken == BESIDE_CLIENTS
        traffic.add(-1)
        await asyncio.sleep(0.01)
        assert slots._places.taken == 4
        release.set()
        assert await asyncio.gather(*tasks) == names
        assert runs["a1"] == 1  # the oldest one was never aborted

    asyncio.run(use())
