"""Replica: keep one engine of a model running. If it ends or sends no heartbeat, replace it by a new one."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from octavo.engine.messages import EngineInfo
from octavo.errors import EngineDead

from .links.link import Exit, Link
from .links.messages import HEARTBEAT, Alive, Failed, FromEngine, Loading, Ready, ToEngine, Tokens
from .live import LiveRequest
from .readmission import Readmission
from .router import Load

TICK = HEARTBEAT  # seconds between checks of the engine
SILENT_TICKS = 5  # consecutive checks without a message after which a ready engine counts as stopped
LOADING_TICKS = 10  # the same for a loading engine, whose threads may wait for a disk
FIRST_SIGN = 60.0  # seconds within which the first engine's process must send its first message
NEXT_SIGN = 5.0  # the same for a replacement; doubled for each failed engine in a row, up to FIRST_SIGN
STEP_SECONDS = 5.0  # time that any step may take
STEP_LIMIT = 20  # a computation may also take this many times the slowest one so far, scaled to its number of tokens
QUICK_RESTARTS = 3  # restarts without a pause, while no engine computes a token or lives for STABLE seconds
STABLE = 10.0
FIRST_PAUSE, MAX_PAUSE = 0.25, 10.0  # seconds before further restarts; each pause is twice the one before

log = logging.getLogger("octavo")


class ReplicaOwner(Protocol):
    """The frontend's methods that a replica calls."""

    async def replica_ready(self, replica: "Replica", info: EngineInfo) -> None:
        """Take over a loaded engine, the first one or a replacement. It accepts messages from now on.

        If this raises, because the engine cannot replace the one before, the engine is ended.
        """
        ...

    def replica_lost(self, replica: "Replica", exit: Exit) -> None:
        """Note that the engine has ended. Messages that it has not answered are lost."""
        ...

    def replica_delayed(self, replica: "Replica") -> None:
        """Note that a replacement did not load. It is tried again."""
        ...

    def replica_message(self, replica: "Replica", message: FromEngine) -> None:
        """Handle an answer of the engine: Tokens, Stats, StateDone or Pages; or Leaving."""
        ...

    def replica_send(self, replica: "Replica", live: LiveRequest) -> None:
        """Send a request to the engine."""
        ...

    def replica_opened(self, replica: "Replica") -> None:
        """Note that the replica begins to take any request."""
        ...


class Replica:
    """One supervised engine. To be used on one event loop.

    If the first engine does not load, `start` raises the error. A replacement that does not load is started again, with
    longer and longer pauses, as long as the frontend lives. An engine is ended and replaced if SILENT_TICKS checks in a
    row find no message from it, or if a step takes longer than both STEP_SECONDS and STEP_LIMIT allow.

    Args:
        connect: starts an engine, which begins to load.
        number: the replica's number among those of its model.
        load: the router's knowledge about this replica.
        name: for messages about this replica's engines, such as "the engine" or "engine 2".
        max_pause: longest pause before another attempt to start an engine, in seconds.

    Attributes:
        readmission: the order in which requests are sent to the next engine after a crash.
        alive: the latest heartbeat.
        is_leaving: whether the replica is being drained or closed, so that it takes no more requests.
        ended: set when the current engine has ended.
    """

    def __init__(
        self,
        connect: Callable[[], Link],
        owner: ReplicaOwner,
        load: Load,
        number: int = 0,
        name: str = "the engine",
        max_pause: float = MAX_PAUSE,
    ):
        self._connect, self._owner, self.load, self.number, self.name = connect, owner, load, number, name
        self.readmission = Readmission(lambda live: owner.replica_send(self, live), lambda: owner.replica_opened(self))
        self.is_leaving, self._max_pause = False, max_pause
        self._task: asyncio.Task[None] | None = None
        self._loaded: asyncio.Future[EngineInfo] | None = None
        self._is_closed = False
        self.ended = asyncio.Event()
        self._heard = False  # whether a message has arrived since the last check
        self.alive = Alive()
        self._failures = 0  # restarts since an engine last computed a token or lived for STABLE seconds
        self.link: Link | None = None
        self.is_ready = False
        self.status = "is loading"  # for messages: "the engine is loading"

    @property
    def is_open(self) -> bool:
        """Return whether the replica takes any request."""
        return self.readmission.is_open and not self.is_leaving and not self.ended.is_set()

    async def start(self, link: Link) -> EngineInfo:
        """Wait until the first engine, which `link` has begun to load, is ready.

        Raises any error from loading, and EngineDead if `close` is called.
        """
        info = await self._load(link)
        await self._serve(info)
        self._task = asyncio.create_task(self._keep_running())
        return info

    def begin(self) -> None:
        """Connect to an engine that others run, in the background, as often as it takes."""
        self._failures = QUICK_RESTARTS  # every attempt may take a while, and it may not be there yet
        self._task = asyncio.create_task(self._keep_running())

    def send(self, message: ToEngine) -> None:
        """Send a message to the engine if it is ready; otherwise drop it. Raises the errors of Link.send.

        Dropping is safe: when an engine becomes ready, the owner sends it all live requests.
        """
        if self.is_ready and self.link is not None:
            self.link.send(message)

    async def close(self) -> None:
        """End the engine: cleanly if it is ready, otherwise by killing it. Then no other one is started."""
        was_ready, self.is_ready, self.status = self.is_ready, False, "was shut down"
        self._is_closed = self.is_leaving = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        self.ended.set()  # ends `start`
        if self.link is not None:
            await (self.link.close() if was_ready else self.link.kill())

    async def _keep_running(self) -> None:
        if not self.is_ready:
            await self._restart()
        while True:
            begun = time.monotonic()
            exit = await self._watch()
            if time.monotonic() - begun > STABLE:
                self._failures = 0
            self.is_ready, self.status = False, f"ended ({exit.reason}) and is starting again"
            log.error("%s ended unexpectedly (%s)", self.name, exit.reason)
            self._owner.replica_lost(self, exit)
            await self._restart()

    async def _restart(self) -> None:
        """Load engines until one is ready."""
        while True:
            await asyncio.sleep(self._pause())
            try:
                await self._serve(await self._load(self._connect()))
                return
            except Exception as error:  # the next attempt may succeed
                status = f"does not start and is tried again: {' '.join(str(error).split())}"
                if status != self.status:
                    log.error("%s %s", self.name, status)
                self.status = status
                self._owner.replica_delayed(self)

    def _pause(self) -> float:
        """Count a restart, and return the seconds to wait before it."""
        self._failures += 1
        extra = self._failures - QUICK_RESTARTS
        return min(FIRST_PAUSE * 2.0 ** min(extra - 1, 10), self._max_pause) if extra > 0 else 0.0

    async def _load(self, link: Link) -> EngineInfo:
        """Wait until the engine behind `link` is ready. Raises any error from loading, or EngineDead."""
        self.link, self._heard, self.alive = link, False, Alive()
        self.ended = asyncio.Event()
        if self._is_closed:
            self.ended.set()
        loaded: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._loaded = loaded
        await link.connect(self._on_message, self.ended.set)
        watching = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait((loaded, watching), return_when=asyncio.FIRST_COMPLETED)
            if loaded.done():
                return loaded.result()
            reason = watching.result().reason
            raise EngineDead(
                "the engine was shut down" if self._is_closed else f"the engine ended while it was loading ({reason})"
            )
        except BaseException:
            watching.cancel()
            await link.kill()
            raise
        finally:
            watching.cancel()
            loaded.cancel()

    async def _serve(self, info: EngineInfo) -> None:
        """Announce the loaded engine to the owner. If the owner raises, kill the engine and raise the same error."""
        assert self.link is not None
        self.is_ready, self.status = True, "is ready"
        try:
            await self._owner.replica_ready(self, info)
        except BaseException:
            self.is_ready = False
            await self.link.kill()
            raise

    async def _watch(self) -> Exit:
        """Wait until the engine ends, or kill it if it hangs. Return how it ended."""
        assert self.link is not None
        problem, is_fault = None, False
        first_sign = min(NEXT_SIGN * 2.0 ** min(self._failures, 10), FIRST_SIGN) if self._failures else FIRST_SIGN
        usual = SILENT_TICKS if self.is_ready else LOADING_TICKS
        patience = usual if self._heard or self.is_ready else round(first_sign / TICK)
        silent = 0
        while problem is None and not self.ended.is_set():
            try:
                async with asyncio.timeout(TICK):  # in Python 3.11, wait_for may lose the cancellation by `close`
                    await self.ended.wait()
            except TimeoutError:
                # Silence is counted in checks, not seconds: while this process is stopped, so are the checks.
                silent, self._heard = (0, False) if self._heard else (silent + 1, False)
                patience = min(patience, usual) if not silent else patience
                if self.link.heartbeats and silent >= patience:
                    problem = f"no message for {silent * TICK:g} s"
                elif self.alive.step_seconds > (limit := self._step_limit()):
                    problem, is_fault = f"a step took longer than {limit:.0f} s", True
        self.ended.set()  # it gets no more requests, even if it takes a while to end
        exit = await self.link.kill()
        return exit if problem is None else Exit(problem, is_fault, exit.work)

    def _step_limit(self) -> float:
        """Return the seconds that the current step may take."""
        alive = self.alive
        if not alive.rows:
            return STEP_SECONDS
        return max(STEP_SECONDS, STEP_LIMIT * alive.slowest_seconds * max(1.0, alive.rows / alive.slowest_rows))

    def _on_message(self, message: FromEngine) -> None:
        self._heard = True
        match message:
            case Alive():
                self.alive = message
                self.load.seconds_per_token = message.seconds_per_token or self.load.seconds_per_token
                self.load.seconds_per_fetched_token = message.seconds_per_fetched_token
            case Loading():
                self.status = f"is loading ({message.done / max(message.total, 1):.0%})"
            case Ready():
                if self._loaded is not None and not self._loaded.done():
                    self._loaded.set_result(message.info)
            case Failed():
                if self._loaded is not None and not self._loaded.done():
                    self._loaded.set_exception(message.exception())
            case _:
                if isinstance(message, Tokens) and message.outputs:
                    self._failures = 0
                self._owner.replica_message(self, message)
