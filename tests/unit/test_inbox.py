"""Inbox: everything in order, one wake-up, errors last."""

import asyncio

import pytest

from octavo.frontend.inbox import Inbox


def test_all_that_has_come_is_one_wake_up() -> None:
    async def main() -> list[list[int]]:
        inbox: Inbox[int] = Inbox()
        taking = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)  # now it waits
        inbox.put(1)
        inbox.put(2)
        first = await taking
        inbox.put(3)
        return [first, await inbox.take()]

    assert asyncio.run(main()) == [[1, 2], [3]]


def test_an_error_comes_after_what_came_before_it() -> None:
    async def main() -> None:
        inbox: Inbox[int] = Inbox()
        inbox.put(1)
        inbox.fail(ValueError("over"))
        assert await inbox.take() == [1]
        with pytest.raises(ValueError, match="over"):
            await inbox.take()

    asyncio.run(main())


def test_an_error_wakes_and_a_reader_that_left_does_no_harm() -> None:
    async def main() -> None:
        inbox: Inbox[int] = Inbox()
        leaving = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        leaving.cancel()
        inbox.put(1)  # before the task has noticed
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert await inbox.take() == [1]
        waiting = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        inbox.fail(ValueError("over"))
        with pytest.raises(ValueError, match="over"):
            await waiting

    asyncio.run(main())
