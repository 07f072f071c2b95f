"""Replica: one engine kept running. When its link ends or falls silent, a new one takes its place."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from octavo.engine.messages import EngineInfo
from octavo.errors import EngineDead

from .links.link import Exit, Link
from .links.messages import HEARTBEAT, Alive, Failed, FromEngine, Loading, Ready, ToEngine, Tokens

TICK = HEARTBEAT  # seconds between two looks at the engine
SILENT_TICKS = 5  # looks without a message in between, after which an engine that is ready counts as stopped
LOADING_TICKS = 10  # the same for one that loads, whose threads may wait for a disk
FIRST_SIGN = 60.0  # seconds for a new process to say something at all
NEXT_SIGN = 5.0  # the same for one that replaces another; twice that for each engine in a row that has failed
STEP_SECONDS = 5.0  # that any step may take
STEP_LIMIT = 20  # times the slowest computation so far, scaled to its tokens, that a computation may take
QUICK_RESTARTS = 3  # restarts without a pause, while no engine computes a token or lives for STABLE seconds
STABLE = 10.0
FIRST_PAUSE, MAX_PAUSE = 0.25, 10.0  # seconds between further restarts; each pause is twice the one before

log = logging.getLogger("octavo")


class ReplicaOwner(Protocol):
    """What a replica tells its frontend."""

    async def replica_ready(self, info: EngineInfo) -> None:
        """The engine has loaded, for the first time or again; it may be sent messages from now on.

        Raises whatever makes this engine unfit to take the place of the one before; it is ended then.
        """
        ...

    def replica_lost(self, exit: Exit) -> None:
        """The engine has ended; what it was sent and has not answered is lost."""
        ...

    def replica_message(self, message: FromEngine) -> None:
        """The engine said something other than how it is."""
        ...


class Replica:
    """One supervised engine. For one event loop.

    If the first engine does not load, `start` raises why; later ones are tried again, with longer and longer pauses,
    for as long as the frontend lives. An engine is ended and replaced if it sends nothing for SILENT_TICKS looks, or if
    a step takes longer than STEP_SECONDS and, while it computes, than STEP_LIMIT allows by the speed measured so far.

    Args:
        connect: starts an engine that loads.
    """

    def __init__(self, connect: Callable[[], Link], owner: ReplicaOwner):
        self._connect, self._owner = connect, owner
        self._task: asyncio.Task[None] | None = None
        self._loaded: asyncio.Future[EngineInfo] | None = None
        self._ended = asyncio.Event()
        self._heard = False  # since the last tick
        self._alive = Alive()  # the latest
        self._failures = 0  # restarts since an engine has worked
        self.link: Link | None = None
        self.is_ready = False
        self.status = "is loading"  # for people: the engine ...

    async def start(self, link: Link) -> EngineInfo:
        """Wait until the first engine, which `link` has begun to load, is ready. Raises what loading raised."""
        info = await self._load(link)
        await self._serve(info)
        self._task = asyncio.create_task(self._keep_running())
        return info

    def send(self, message: ToEngine) -> None:
        """Send a message to the engine if it is ready; the next one is told what is owed. Raises as Link.send."""
        if self.is_ready and self.link is not None:
            self.link.send(message)

    async def close(self) -> None:
        """End the engine, in good order if it answers."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        if self.link is not None:
            await (self.link.close() if self.is_ready else self.link.kill())
        self.is_ready, self.status = False, "was shut down"

    async def _keep_running(self) -> None:
        while True:
            begun = time.monotonic()
            exit = await self._watch()
            if time.monotonic() - begun > STABLE:
                self._failures = 0
            self.is_ready, self.status = False, f"ended ({exit.reason}) and is starting again"
            log.error("the engine ended unexpectedly (%s)", exit.reason)
            self._owner.replica_lost(exit)
            await self._restart()

    async def _restart(self) -> None:
        """Load engines until one is ready."""
        while True:
            await asyncio.sleep(self._pause())
            try:
                await self._serve(await self._load(self._connect()))
                return
            except Exception as error:  # whatever it is, the next attempt may succeed
                self.status = f"does not start, and is tried again: {' '.join(str(error).split())}"
                log.error("the engine %s", self.status)

    def _pause(self) -> float:
        """Return how long to wait before the next restart, and count it."""
        self._failures += 1
        extra = self._failures - QUICK_RESTARTS
        return min(FIRST_PAUSE * 2.0 ** min(extra, 10), MAX_PAUSE) if extra > 0 else 0.0

    async def _load(self, link: Link) -> EngineInfo:
        """Wait until `link` is ready. Raises what loading raised, or EngineDead."""
        self.link, self._heard, self._alive = link, False, Alive()
        self._ended = asyncio.Event()
        loaded: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._loaded = loaded
        await link.connect(self._on_message, self._ended.set)
        watching = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait((loaded, watching), return_when=asyncio.FIRST_COMPLETED)
            if loaded.done():
                return loaded.result()
            raise EngineDead(f"the engine ended while it was loading ({watching.result().reason})")
        except BaseException:
            watching.cancel()
            await link.kill()
            raise
        finally:
            watching.cancel()
            loaded.cancel()

    async def _serve(self, info: EngineInfo) -> None:
        """Hand the engine that has loaded to the owner. If that raises, end the engine and raise the same."""
        assert self.link is not None
        self.is_ready, self.status = True, "is ready"
        try:
            await self._owner.replica_ready(info)
        except BaseException:
            self.is_ready = False
            await self.link.kill()
            raise

    async def _watch(self) -> Exit:
        """Wait until the engine ends, or end it because it stopped. Return how it ended."""
        assert self.link is not None
        problem, is_fault = None, False
        first_sign = min(NEXT_SIGN * 2.0 ** min(self._failures, 10), FIRST_SIGN) if self._failures else FIRST_SIGN
        usual = SILENT_TICKS if self.is_ready else LOADING_TICKS
        patience = usual if self._heard or self.is_ready else round(first_sign / TICK)
        silent = 0
        while problem is None and not self._ended.is_set():
            try:
                await asyncio.wait_for(self._ended.wait(), TICK)
            except TimeoutError:
                # Counted in looks, not in seconds: while this process was stopped too, nothing is the engine's fault.
                silent, self._heard = (0, False) if self._heard else (silent + 1, False)
                patience = min(patience, usual) if not silent else patience
                if self.link.heartbeats and silent >= patience:
                    problem = f"no sign of life for {silent * TICK:g} s"
                elif self._alive.step_seconds > (limit := self._step_limit()):
                    problem, is_fault = f"a step took longer than {limit:.0f} s", True
        exit = await self.link.kill()
        return exit if problem is None else Exit(problem, is_fault, exit.work)

    def _step_limit(self) -> float:
        """Return the seconds that the present step may take."""
        alive = self._alive
        if not alive.rows:
            return STEP_SECONDS
        return max(STEP_SECONDS, STEP_LIMIT * alive.slowest_seconds * max(1.0, alive.rows / alive.slowest_rows))

    def _on_message(self, message: FromEngine) -> None:
        self._heard = True
        match message:
            case Alive():
                self._alive = message
            case Loading():
                self.status = f"is loading ({message.done / max(message.total, 1):.0%})"
            case Ready():
                if self._loaded is not None and not self._loaded.done():
                    self._loaded.set_result(message.info)
            case Failed():
                if self._loaded is not None and not self._loaded.done():
                    self._loaded.set_exception(message.exception())
            case _:
                if isinstance(message, Tokens):
                    self._failures = 0
                self._owner.replica_message(message)
