"""Run the rows of a batch with bounded concurrency and memory, and return their results in the order of the rows."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from octavo.errors import EngineDead

from .call import Reply, call
from .lines import Result, Row, failed, result_of

BLOCKS = 4  # in a window; the rows of a block are read together and started in the order of their bodies
WINDOW_BYTES = 16 * 2**20  # default of BatchRun
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

    Rows of a block with the same beginning run next to each other, while the pages of their common prefix are cached.

    Args:
        app: the application.
        slots: limits the requests that run.
        window: the maximum number of rows between the oldest unfinished one and the newest one that was started. It
            exceeds the number of slots, so that one long answer does not leave the others' slots empty.
        headers: of every request.
        window_bytes: maximum size of the rows and results in a window; beyond it, no rows are read until some results
            are returned.
    """

    def __init__(
        self,
        app: Any,
        slots: Slots,
        window: int,
        headers: Sequence[tuple[bytes, bytes]] = (),
        window_bytes: int = WINDOW_BYTES,
    ):
        self._app = app
        self._slots = slots
        self._window = window
        self._headers = headers
        self._window_bytes = window_bytes
        self._held = _Held(window_bytes)

    async def results(self, rows: Iterator[Row]) -> AsyncGenerator[list[Result], None]:
        """Yield the results of all rows, in order, as many at a time as are complete.

        Closing the generator aborts what runs. Raises EngineDead if the engine is unavailable for PATIENCE seconds.
        """
        tasks: asyncio.Queue[asyncio.Task[Result] | None] = asyncio.Queue(self._window)
        started: set[asyncio.Task[Result]] = set()
        starter = asyncio.ensure_future(self._start(rows, tasks, started))
        try:
            ready: list[Result] = []
            while (task := await tasks.get()) is not None:
                if ready and not task.done():
                    yield self._returned(ready)
                    ready = []
                ready.append(await task)
                started.discard(task)
                if len(ready) >= self._window or tasks.empty():
                    yield self._returned(ready)
                    ready = []
            await starter
            if ready:
                yield self._returned(ready)
        finally:
            for each in (starter, *started):
                each.cancel()
            while not tasks.empty():
                tasks.get_nowait()  # the starter may wait for space
            await asyncio.wait([starter, *started])

    async def _start(
        self,
        rows: Iterator[Row],
        tasks: "asyncio.Queue[asyncio.Task[Result] | None]",
        started: "set[asyncio.Task[Result]]",
    ) -> None:
        """Start a task for each row, and put them into `tasks` in the order of the rows, then None."""
        size = max(self._window // BLOCKS, 1)
        try:
            while block := await asyncio.to_thread(_take, rows, size, self._window_bytes // BLOCKS):
                self._held.add(sum(len(row.body) for row in block))
                by_body = sorted(block, key=lambda row: row.body)
                task_of = {row: asyncio.ensure_future(self._result(row)) for row in by_body}
                started.update(task_of.values())
                for row in block:
                    await tasks.put(task_of[row])
                await self._held.below_limit()
        finally:
            await tasks.put(None)

    def _returned(self, results: list[Result]) -> list[Result]:
        self._held.add(-sum(len(result.line) for result in results))
        return results

    async def _result(self, row: Row) -> Result:
        if row.error is not None:
            result = failed(row, row.error)
        else:
            reply = await self._slots.run(lambda: self._answered(row))
            result = result_of(row, reply.status, reply.request_id, reply.body)
        self._held.add(len(result.line) - len(row.body))
        return result

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


class _Held:
    """Counts the bytes of rows and results in memory."""

    def __init__(self, limit: int):
        self._limit = limit
        self._bytes = 0
        self._is_below = asyncio.Event()
        self._is_below.set()

    def add(self, number: int) -> None:
        """Add a number of bytes, or subtract it if it is negative."""
        self._bytes += number
        if self._bytes < self._limit:
            self._is_below.set()
        else:
            self._is_below.clear()

    async def below_limit(self) -> None:
        """Wait until there are fewer bytes than the limit."""
        await self._is_below.wait()


def _take(rows: Iterator[Row], count: int, size: int) -> list[Row]:
    """Return the next rows, up to `count` of them and about `size` bytes."""
    block: list[Row] = []
    for row in rows:
        block.append(row)
        size -= len(row.body)
        if len(block) == count or size <= 0:
            break
    return block


def _message(reply: Reply) -> str:
    import json

    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(reply.body)["error"]["message"])
    return f"status {reply.status}"
