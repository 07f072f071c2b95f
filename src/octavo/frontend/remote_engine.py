"""An engine in a process of its own, kept alive: if it crashes, a new one goes on with every live request.

A resumed request gets the tokens it would have got: the new engine recomputes what the ledger says it had, and draws
by position, not by history.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig
from octavo.engine.messages import EngineInfo, EngineStats
from octavo.errors import EngineDead, OctavoError
from octavo.states import KVState, StateBook
from octavo.states.file import read_saved_tokens
from octavo.text import Tokenizer

from .admission import Admission, FrontendStats
from .engine_process import EngineProcess, raised
from .ledger import Ledger, Sink
from .live import LiveRequest
from .prompts import Ask
from .wire import Abort, AskStats, LoadState, Pin, SaveState, StateDone, Stats, Submit, Tokens, Unpin

log = logging.getLogger("octavo")

MAX_CRASHES = 3  # within CRASH_WINDOW seconds: more than that is no accident
CRASH_WINDOW = 60.0
FILE_PATIENCE = 5.0  # seconds for a new engine to open the files of KV states


class RemoteEngine:
    """For one event loop; sinks are called on it."""

    def __init__(self, config: EngineConfig, path: Path):
        self._config = config
        self._path = path
        self._process = EngineProcess(config, path)
        self._serving: EngineProcess | None = None  # the process, while it is ready for requests
        self._ledger: Ledger | None = None
        self._admission = Admission(config.max_batch_size, config.max_queue)
        self._supervisor: asyncio.Task[None] | None = None
        self._stats: list[asyncio.Future[EngineStats]] = []
        self._state_jobs: dict[str, asyncio.Future[None]] = {}  # by the id of the message
        self._crashes: list[float] = []
        self.dead: asyncio.Event = asyncio.Event()

    async def start(self, tokenizer: Tokenizer) -> EngineInfo:
        """Wait until the engine is ready. Raises what loading raised."""
        try:
            info = await self._process.ready()
        except BaseException:
            self.end_process()
            raise
        self.info = info
        self.states = StateBook(self, info.fingerprint, self._config.kv_state_quota, self._config.kv_state_ttl)
        self._ledger = Ledger(tokenizer, info, self.states)
        self._serving = self._process
        self._supervisor = asyncio.create_task(self._supervise())
        return info

    def check_capacity(self, completions: int) -> None:
        """Raises QueueFull or InvalidRequest if so many more may not be asked for, EngineDead."""
        self._admission.check(self._living_ledger().num_completions, completions)

    def submit(self, asks: list[Ask], sink: Sink, request_id: str | None = None) -> list[LiveRequest]:
        """Start requests, all or none. Raises QueueFull, InvalidRequest, PromptTooLong, EngineDead."""
        self.check_capacity(sum(ask.params.n for ask in asks))
        lives, requests = self._living_ledger().open(asks, sink, request_id)
        if self._serving:  # if not, the next process is told all that is owed
            self._serving.send(Submit(requests))
        return lives

    def abort(self, ids: Iterable[str], say_so: bool = False) -> None:
        """End requests; without a further word to their sinks, unless `say_so`. Finished ones are left alone."""
        if self._ledger is not None:
            live = self._ledger.num_completions
            self._abort_in_engine([engine_id for id in ids for engine_id in self._ledger.close(id, say_so)])
            self._admission.left(live - self._ledger.num_completions, live)

    def keep_state(self, request_id: str, index: int) -> KVState:
        """A state of a finished request. Raises InvalidRequest, QuotaExceeded, EngineDead."""
        if self._ledger is None or self.dead.is_set():
            raise EngineDead("the engine has stopped")
        return self._ledger.keep_state(request_id, index)

    async def load_state(self, path: Path, tenant: str, salt: str) -> KVState:
        """A state that was saved. Raises InvalidKVState, QuotaExceeded, EngineDead."""
        tokens = await asyncio.to_thread(
            read_saved_tokens, path, self.info.fingerprint, self.info.vocab_size, tenant, salt
        )
        state = self.states.adopt(path, tokens, tenant, salt)
        try:
            await self._await_job(LoadState(state.id, str(path)))
        except BaseException:
            state.drop()
            raise
        return state

    async def save_state(self, state: KVState, path: Path) -> None:
        """Returns when it is written. Raises InvalidKVState, RequestFailed, EngineDead."""
        tokens = self.states.use(state, state.tenant, state.salt)
        job = f"save-{uuid.uuid4().hex}"
        await self._await_job(SaveState(job, str(path.absolute()), tokens, state.tenant, state.salt, state.origin))

    def drop_state(self, state: KVState) -> None:
        self.states.drop(state)

    def pin_state(self, state: KVState) -> None:
        if self._serving:
            self._serving.send(Pin(state.id, state.token_ids, state.tenant, state.salt, state.origin))

    def unpin_state(self, state: KVState) -> None:
        if self._serving:
            self._serving.send(Unpin(state.id))

    async def stats(self) -> EngineStats:
        if not self._serving:
            raise EngineDead("the engine is starting again" if not self.dead.is_set() else "the engine has stopped")
        answer: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._stats.append(answer)
        self._serving.send(AskStats())
        return await answer

    def frontend_stats(self) -> FrontendStats:
        ledger, admission = self._living_ledger(), self._admission
        return FrontendStats(ledger.num_completions, admission.limit, admission.refused, ledger.timed_out)

    async def close(self) -> None:
        """End the process. Live requests get EngineDead."""
        if self._supervisor:
            self._supervisor.cancel()
            await asyncio.wait((self._supervisor,))
        self._stop(EngineDead("the engine was shut down"))
        self.end_process()

    def end_process(self) -> None:
        self._process.end()

    async def _await_job(self, message: SaveState | LoadState) -> None:
        if not self._serving:
            raise EngineDead("the engine is starting again" if not self.dead.is_set() else "the engine has stopped")
        self._state_jobs[message.id] = done = asyncio.get_running_loop().create_future()
        self._serving.send(message)
        await done

    def _living_ledger(self) -> Ledger:
        if self._ledger is None or self.dead.is_set():
            raise EngineDead("the engine has stopped")
        return self._ledger

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
            self._fail_waiting(EngineDead("the engine crashed"))
            self._crashes = [*(at for at in self._crashes if time.monotonic() - at < CRASH_WINDOW), time.monotonic()]
            if len(self._crashes) > MAX_CRASHES:
                self._stop(EngineDead(f"the engine crashed {len(self._crashes)} times in a minute"))
                return
            await self._restart()

    async def _restart(self) -> None:
        self._process.end()
        self._process = EngineProcess(self._config, self._path)
        await self._process.ready()
        await self._open_state_files()
        assert self._ledger is not None
        owed = self._ledger.owed()
        log.warning("a new engine process continues %d requests", len(owed))
        self._serving = self._process
        self._serving.send(Submit(owed))

    async def _open_state_files(self) -> None:
        """Before a new engine is asked for anything, so that it fetches pages that it could only compute otherwise."""
        loaded = self.states.loaded()
        for state in loaded:
            self._process.send(LoadState(state.id, str(state.file)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FILE_PATIENCE):
                for _ in loaded:
                    await self._process.receive()  # StateDone, whether it could or not

    async def _receive_until_exit(self, process: EngineProcess) -> None:
        assert self._ledger is not None
        while (message := await process.receive()) is not None:
            if isinstance(message, Tokens):
                live = self._ledger.num_completions
                self._abort_in_engine(self._ledger.deliver(message.outputs))
                self._admission.left(live - self._ledger.num_completions, live)
            elif isinstance(message, Stats) and self._stats:
                self._stats.pop(0).set_result(message.stats)
            elif isinstance(message, StateDone):
                self._end_job(message)

    def _end_job(self, message: StateDone) -> None:
        done = self._state_jobs.pop(message.id, None)
        if done is None or done.done():  # asked for after a crash, or its user has gone
            return
        if message.failed:
            done.set_exception(raised(message.failed))
        else:
            done.set_result(None)

    def _fail_waiting(self, error: EngineDead) -> None:
        answers: list[asyncio.Future[Any]] = [*self._stats, *self._state_jobs.values()]
        for answer in answers:
            if not answer.done():
                answer.set_exception(error)
        self._stats.clear()
        self._state_jobs.clear()

    def _stop(self, error: EngineDead) -> None:
        self._serving = None
        self.dead.set()
        self._fail_waiting(error)
        if self._ledger is not None:
            self._ledger.fail(error)
