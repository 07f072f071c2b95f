"""An engine in a process of its own, kept alive: if it crashes, a new one goes on with every live request.

A resumed request gets the tokens it would have got: the new engine recomputes what the ledger says it had, and draws
by position, not by history.
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from pathlib import Path

from octavo.config import EngineConfig
from octavo.engine.messages import EngineInfo, EngineStats
from octavo.errors import EngineDead, OctavoError
from octavo.text import Tokenizer

from .engine_process import EngineProcess
from .ledger import Ledger, Sink
from .live import LiveRequest
from .prompts import Ask
from .wire import Abort, AskStats, Stats, Submit, Tokens

log = logging.getLogger("octavo")

MAX_CRASHES = 3  # within CRASH_WINDOW seconds: more than that is no accident
CRASH_WINDOW = 60.0


class RemoteEngine:
    """For one event loop; sinks are called on it."""

    def __init__(self, config: EngineConfig, path: Path):
        self._config = config
        self._path = path
        self._process = EngineProcess(config, path)
        self._serving: EngineProcess | None = None  # the process, while it is ready for requests
        self._ledger: Ledger | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stats: list[asyncio.Future[EngineStats]] = []
        self._crashes: list[float] = []
        self.dead: asyncio.Event = asyncio.Event()

    async def start(self, tokenizer: Tokenizer) -> EngineInfo:
        """Wait until the engine is ready. Raises what loading raised."""
        try:
            info = await self._process.ready()
        except BaseException:
            self.end_process()
            raise
        self._ledger = Ledger(tokenizer, info)
        self._serving = self._process
        self._supervisor = asyncio.create_task(self._supervise())
        return info

    def submit(self, asks: Iterable[Ask], sink: Sink, request_id: str | None = None) -> list[LiveRequest]:
        """Start requests, all or none. Raises InvalidRequest, PromptTooLong, EngineDead."""
        if self._ledger is None or self.dead.is_set():
            raise EngineDead("the engine has stopped")
        lives, requests = self._ledger.open(asks, sink, request_id)
        if self._serving:  # if not, the next process is told all that is owed
            self._serving.send(Submit(requests))
        return lives

    def abort(self, ids: Iterable[str], say_so: bool = False) -> None:
        """End requests; without a further word to their sinks, unless `say_so`. Finished ones are left alone."""
        if self._ledger is not None:
            self._abort_in_engine([engine_id for id in ids for engine_id in self._ledger.close(id, say_so)])

    async def stats(self) -> EngineStats:
        if not self._serving:
            raise EngineDead("the engine is starting again" if not self.dead.is_set() else "the engine has stopped")
        answer: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._stats.append(answer)
        self._serving.send(AskStats())
        return await answer

    async def close(self) -> None:
        """End the process. Live requests get EngineDead."""
        if self._supervisor:
            self._supervisor.cancel()
            await asyncio.wait((self._supervisor,))
        self._stop(EngineDead("the engine was shut down"))
        self.end_process()

    def end_process(self) -> None:
        self._process.end()

    def _abort_in_engine(self, engine_ids: list[str]) -> None:
        if engine_ids and self._serving:
            self._serving.send(Abort(engine_ids))

    async def _supervise(self) -> None:
        """Keep an engine running; if that fails for whatever reason, nobody may be left waiting."""
        try:
            await self._keep_running()
        except OctavoError as error:
            self._stop(EngineDead(f"the engine crashed and did not start again: {error}"))
        except Exception as error:
            log.exception("the engine's supervisor failed")
            self._stop(EngineDead(f"the frontend lost its engine: {error}"))

    async def _keep_running(self) -> None:
        """Receive until the process ends; then start another one, and owe it the live requests."""
        while True:
            await self._receive_until_exit(self._process)
            self._serving = None
            log.error("the engine process ended unexpectedly (exit code %s)", self._process.exit_code)
            self._fail_stats(EngineDead("the engine crashed"))
            self._crashes = [*(at for at in self._crashes if time.monotonic() - at < CRASH_WINDOW), time.monotonic()]
            if len(self._crashes) > MAX_CRASHES:
                self._stop(EngineDead(f"the engine crashed {len(self._crashes)} times in a minute"))
                return
            await self._restart()

    async def _restart(self) -> None:
        self._process.end()
        self._process = EngineProcess(self._config, self._path)
        await self._process.ready()
        assert self._ledger is not None
        owed = self._ledger.owed()
        log.warning("a new engine process continues %d requests", len(owed))
        self._serving = self._process
        self._serving.send(Submit(owed))

    async def _receive_until_exit(self, process: EngineProcess) -> None:
        assert self._ledger is not None
        while (message := await process.receive()) is not None:
            if isinstance(message, Tokens):
                self._abort_in_engine(self._ledger.deliver(message.outputs))
            elif isinstance(message, Stats) and self._stats:
                self._stats.pop(0).set_result(message.stats)

    def _fail_stats(self, error: EngineDead) -> None:
        for answer in self._stats:
            if not answer.done():
                answer.set_exception(error)
        self._stats.clear()

    def _stop(self, error: EngineDead) -> None:
        self._serving = None
        self.dead.set()
        self._fail_stats(error)
        if self._ledger is not None:
            self._ledger.fail(error)
