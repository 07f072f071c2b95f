"""A value that is computed for all who ask at about the same time."""

import asyncio

from octavo.server.page.shared import Shared


async def ask_together() -> None:
    computed = 0

    async def compute() -> int:
        nonlocal computed
        await asyncio.sleep(0)
        computed += 1
        return computed

    shared = Shared(compute, 0.05)
    assert await asyncio.gather(*(shared.get() for _ in range(50))) == [1] * 50
    waiting = [asyncio.ensure_future(shared.get()) for _ in range(3)]
    waiting[0].cancel()
    assert await waiting[1] == await waiting[2] == 1
    await asyncio.sleep(0.06)
    first, second = asyncio.ensure_future(shared.get()), asyncio.ensure_future(shared.get())
    await asyncio.sleep(0)
    first.cancel()  # the one that computes; the other computes instead
    assert await second == 2


def test_values_are_shared() -> None:
    asyncio.run(ask_together())


async def ask_for_a_slow_value() -> None:
    computed = 0

    async def compute() -> int:
        nonlocal computed
        computed += 1
        await asyncio.sleep(0.02)
        return computed

    shared = Shared(compute, 0.005)
    await asyncio.gather(*(shared.get() for _ in range(5)))
    assert computed <= 2  # the period of a value begins when it is there


def test_a_computation_may_outlast_the_period() -> None:
    asyncio.run(ask_for_a_slow_value())
