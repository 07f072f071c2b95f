"""Background: a response that is generated without its client, and that clients can follow, poll and cancel."""

import asyncio
import contextlib
import zlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from octavo.server.errors import ServerStopping
from octavo.server.openai.events import PING, PING_SECONDS

from .run import Run

EVENT_END = b"\n\n"


@dataclass
class Background:
    """A run in a task of its own.

    Args:
        release: called when the run has ended.
        keep_events: whether to store the events, so that the stream can be read again later.
        events: those so far; an event's index is its sequence number.
    """

    run: Run
    release: Callable[[], None]
    keep_events: bool
    events: list[bytes] = field(default_factory=list)
    _started: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None
    _is_cancelled: bool = False

    async def start(self, tasks: set[asyncio.Task[None]]) -> None:
        """Store the response and start to generate it, in a task that is in `tasks` until it ends.

        The task goes on if the caller is cancelled.
        """
        self._task = asyncio.ensure_future(self._work())
        tasks.add(self._task)
        self._task.add_done_callback(tasks.discard)
        await self._started.wait()

    async def cancel(self) -> None:
        """End the run, unless it has ended already. The response gets the status cancelled."""
        if self._task is not None and not self._task.done():
            self._is_cancelled = True
            self._task.cancel()
            await asyncio.wait([self._task])

    async def follow(self, after: int) -> AsyncGenerator[bytes, None]:
        """Yield the events with sequence numbers above `after`, those to come included."""
        position = after + 1
        while True:
            changed, ended = self._changed, self._task is None or self._task.done()
            if position < len(self.events):
                events, position = self.events[position:], len(self.events)
                yield b"".join(events)
            elif ended:
                return
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PING_SECONDS):
                        await changed.wait()
                if not changed.is_set():
                    yield PING

    async def _work(self) -> None:
        try:
            await self.run.save()
            self._started.set()
            self._add(self.run.builder.begin())
            last = await self._generate()
            await self.run.save(pack(self.events + split(last)) if self.keep_events else None)
            self._add(last)
        finally:
            self.release()
            self._started.set()
            self._changed.set()

    async def _generate(self) -> bytes:
        """Generate the output, and return the last events of the stream."""
        try:
            async with contextlib.aclosing(self.run.output()) as steps:
                async for increments in steps:
                    self._add(self.run.add(increments))
            return self.run.end()
        except asyncio.CancelledError:
            return self.run.cancel() if self._is_cancelled else self.run.fail(ServerStopping())
        except Exception as error:
            return self.run.fail(error)

    def _add(self, events: bytes) -> None:
        self.events += split(events)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def split(events: bytes) -> list[bytes]:
    """Return the single events in encoded events."""
    return [event + EVENT_END for event in events.split(EVENT_END)[:-1]]


def pack(events: list[bytes]) -> bytes:
    """Return events as they are stored."""
    return zlib.compress(b"".join(events), 1)


def unpack(packed: bytes) -> list[bytes]:
    """Return the events in stored ones."""
    return split(zlib.decompress(packed))
