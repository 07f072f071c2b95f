"""Run the rows of a batch with bounded concurrency, and return their results in the order of the rows."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from octavo.errors import EngineDead

from .call import Reply, call
from .lines import Result, Row, failed, result_of

READ_AT_ONCE = 32  # rows that are read from the file together
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)  # between attempts while the server answers 503; the last one repeats
PATIENCE = 300.0  # seconds of 503 after which a batch stops

T = TypeVar("T")


class Slots(Protocol):
    """Limits how many requests run at the same time."""

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Wait for a slot, then run `work` and return its result."""


class FixedSlots:
    """A fixed number of slots."""

    def __init__(self, count: int):
        self._free = asyncio.Semaphore(count)

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        async with self._free:
            return await work()


class BatchRun:
    """Sends rows to the routes of an ASGI application.

    Args:
        app: the application.
        slots: limits the requests that run.
        window: the maximum number of rows between the oldest unfinished one and the newest one that was started. It
            exceeds the number of slots, so that one long answer does not leave the others' slots empty.
        headers: of every request.
    """

    def __init__(self, app: Any, slots: Slots, window: int, headers: Sequence[tuple[bytes, bytes]] = ()):
        self._app = app
        self._slots = slots
        self._window = window
        self._headers = headers

    async def results(self, rows: Iterator[Row]) -> AsyncGenerator[list[Result], None]:
        """Yield the results of all rows, in order, as many at a time as are complete.

        Closing the generator aborts what runs. Raises EngineDead if the engine is unavailable for PATIENCE seconds.
        """
        tasks: asyncio.Queue[asyncio.Task[Result] | None] = asyncio.Queue(self._window)
        started: set[asyncio.Task[Result]] = set()

        async def start() -> None:
            try:
                while group := await asyncio.to_thread(lambda: list(itertools.islice(rows, READ_AT_ONCE))):
                    for row in group:
                        task = asyncio.ensure_future(self._result(row))
                        started.add(task)
                        await tasks.put(task)
            finally:
                await tasks.put(None)

        starter = asyncio.ensure_future(start())
        try:
            ready: list[Result] = []
            while (task := await tasks.get()) is not None:
                if ready and not task.done():
                    yield ready
                    ready = []
                ready.append(await task)
                started.discard(task)
                if len(ready) >= self._window or tasks.empty():
                    yield ready
                    ready = []
            await starter
            if ready:
                yield ready
        finally:
            for each in (starter, *started):
                each.cancel()
            while not tasks.empty():
                tasks.get_nowait()  # the starter may wait for space
            await asyncio.wait([starter, *started])

    async def _result(self, row: Row) -> Result:
        if row.error is not None:
            return failed(row, row.error)
        reply = await self._slots.run(lambda: self._answered(row))
        return result_of(row, reply.status, reply.request_id, reply.body)

    async def _answered(self, row: Row) -> Reply:
        """Return the reply to a row. Repeats the request while the server is full or an engine restarts."""
        began = time.monotonic()
        for pause in itertools.chain(RETRY_SECONDS, itertools.repeat(RETRY_SECONDS[-1])):
            reply = await call(self._app, row.url, row.body, self._headers)
            if reply.status != 503:
                return reply
            if time.monotonic() - began > PATIENCE:
                raise EngineDead(f"the batch stopped, since requests failed for {PATIENCE:.0f} s: {_message(reply)}")
            await asyncio.sleep(pause)
        raise AssertionError


def _message(reply: Reply) -> str:
    import json

    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(reply.body)["error"]["message"])
    return f"status {reply.status}"
