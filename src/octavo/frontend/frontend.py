"""Frontend: keeps live requests while the engine that serves them may crash and be replaced at any time."""

import asyncio
import itertools
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig
from octavo.engine.messages import EngineInfo, EngineStats, TokenOutput
from octavo.errors import EngineDead, InvalidRequest, OctavoError, RequestFailed, RequestTimeout
from octavo.outputs import RequestOutput
from octavo.states import KVState, StateBook
from octavo.states.file import read_saved_tokens
from octavo.states.handle import StateOwner
from octavo.text import Tokenizer

from .admission import Admission, FrontendStats
from .ledger import Ledger
from .links.link import Exit, Link
from .links.messages import (
    Abort,
    AskStats,
    FromEngine,
    LoadState,
    Pin,
    SaveState,
    StateDone,
    Stats,
    Submit,
    Tokens,
    Unpin,
)
from .live import LiveRequest, Sink
from .readmission import TRIAL_TOKENS, Readmission
from .replica import Replica
from .requests import Request, check_length

FILE_PATIENCE = 5.0  # seconds for a new engine to open the files of KV states

log = logging.getLogger("octavo")


class Frontend:
    """The requests of one model, its KV states, and the engine that serves them.

    Call all methods on the event loop that calls `start`; sinks are called on it too. If a sink raises, its own request
    is aborted.

    Args:
        connect: starts an engine, which begins to load the model.
        has_queue_limit: whether `submit` raises QueueFull beyond max_batch_size plus max_queue completions.
        state_owner: the object that the methods of KV states call; this frontend by default.
    """

    info: EngineInfo  # set by `start`
    states: StateBook

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        connect: Callable[[], Link],
        has_queue_limit: bool,
        state_owner: StateOwner | None = None,
    ):
        self._config, self._tokenizer = config, tokenizer
        self._state_owner = state_owner or self
        self._admission = Admission(config.max_batch_size, config.max_queue) if has_queue_limit else None
        self._ledger: Ledger | None = None
        self.replica = Replica(connect, self)
        self._readmission = Readmission(self._send_request)
        self._jobs: dict[str, asyncio.Future[None]] = {}  # pending LoadState and SaveState messages, by id
        self._stats: dict[int, asyncio.Future[EngineStats]] = {}
        self._stats_ids = itertools.count()
        self._deadline: asyncio.TimerHandle | None = None
        self._deadline_at: float | None = None  # time.monotonic()
        self._timed_out = 0
        self._closed = False
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self, link: Link) -> EngineInfo:
        """Wait until the engine that `link` has begun to load is ready.

        Raises any error from loading the model, and DamagedWeights if the tokenizer has tokens that the model lacks.
        """
        self._loop = asyncio.get_running_loop()
        _ = self._tokenizer.last_token_id  # computed while the engine loads
        info = await self.replica.start(link)
        try:
            self._tokenizer.check_vocabulary(info.vocab_size)
        except BaseException:
            await self.close()
            raise
        return info

    def readiness(self) -> tuple[bool, str]:
        """Return whether an engine is ready to serve, and its status as text, such as "the engine is ready"."""
        return self.replica.is_ready, f"the engine {self.replica.status}"

    # Requests

    def check_capacity(self, completions: int) -> None:
        """Raise QueueFull or InvalidRequest if `submit` would refuse so many completions; EngineDead."""
        ledger = self._living()
        if self._admission is not None:
            self._admission.check(ledger.num_completions, completions)

    def submit(
        self, requests: list[Request], tokens: list[list[int]], sink: Sink, request_id: str | None = None
    ) -> list[LiveRequest]:
        """Start all requests, or none if one of them is invalid.

        Args:
            tokens: the prompts' token ids, from `requests.tokenize`.
            sink: called with the live request and each of its increments, or with the error that ended it.
            request_id: the id of a single request; by default a random one.

        Raises QueueFull, InvalidRequest, PromptTooLong, InvalidKVState, EngineDead.
        """
        self.check_capacity(sum(request.params.n for request in requests))
        ledger, lives = self._living(), list[LiveRequest]()
        try:
            for request, prompt in zip(requests, tokens, strict=True):
                lives.append(ledger.open(request, self._with_state(request, prompt), sink, request_id))
        except BaseException:
            for live in lives:
                ledger.close(live)
            raise
        for live in lives:
            self._readmission.add(live)
        self._watch_deadlines()
        return lives

    def abort(self, lives: Iterable[LiveRequest], notify: bool = False) -> None:
        """Abort requests. Requests that have ended are ignored.

        Args:
            notify: whether to send the sink a last increment with finish_reason "abort".
        """
        for live in lives:
            if self._close(live) and notify:
                self._deliver(live, live.abort())

    def find(self, request_id: str) -> LiveRequest | None:
        return self._ledger.get(request_id) if self._ledger is not None else None

    def stats(self) -> FrontendStats:
        """Return the frontend's statistics. Raises EngineDead."""
        ledger, admission = self._living(), self._admission
        limit, refused = (admission.limit, admission.refused) if admission else (0, 0)
        return FrontendStats(ledger.num_completions, limit, refused, self._timed_out)

    async def engine_stats(self, patience: float | None = None) -> EngineStats:
        """Return the engine's statistics. Raises EngineDead without a ready engine, or after `patience` seconds."""
        self._living()
        if not self.replica.is_ready:
            raise EngineDead(f"the engine {self.replica.status}")
        id = next(self._stats_ids)
        answer: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._stats[id] = answer
        try:
            self.replica.send(AskStats(id))
            async with asyncio.timeout(patience):
                return await answer
        except TimeoutError:
            raise EngineDead("the engine is busy and has not answered yet") from None
        finally:
            del self._stats[id]

    # KV states

    def keep_state(self, request_id: str, index: int) -> KVState:
        """Make a state of a finished request. Raises InvalidRequest, QuotaExceeded, EngineDead."""
        if request_id in self._living():
            raise InvalidRequest(f"the request {request_id!r} still runs; it has a state after its end", "request_id")
        return self.states.keep(request_id, index)

    async def load_state(self, path: Path, tenant: str, salt: str) -> KVState:
        """Make a state of a saved file. Raises InvalidKVState, QuotaExceeded, EngineDead."""
        self._living()
        info = self.info
        tokens = await asyncio.to_thread(read_saved_tokens, path, info.fingerprint, info.vocab_size, tenant, salt)
        state = self.states.adopt(path, tokens, tenant, salt)
        try:
            await self._job(LoadState(state.id, str(path)))
        except BaseException:
            state.drop()
            raise
        return state

    async def save_state(self, state: KVState, path: Path) -> None:
        """Write a state to a file. Raises InvalidKVState, RequestFailed, EngineDead."""
        self._living()
        tokens = self.states.use(state, state.tenant, state.salt)
        job = f"save-{uuid.uuid4().hex}"
        await self._job(SaveState(job, str(path.absolute()), tokens, state.tenant, state.salt, state.origin))

    def drop_state(self, state: KVState) -> None:
        self.states.drop(state)

    def pin_state(self, state: KVState) -> None:
        self.replica.send(Pin(state.id, state.token_ids, state.tenant, state.salt, state.origin))

    def unpin_state(self, state: KVState) -> None:
        self.replica.send(Unpin(state.id))

    # The end

    async def close(self) -> None:
        """End the engine. Live requests fail with EngineDead."""
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        error = EngineDead("the engine was shut down")
        self._fail_waiting(error)
        for live in self._ledger or ():
            self._fail(live, error)
        await self.replica.close()

    # Callbacks of the replica (see ReplicaOwner)

    async def replica_ready(self, info: EngineInfo) -> None:
        if self._ledger is None:
            self.info = info
            self.states = StateBook(
                self, self._state_owner, info.fingerprint, self._config.kv_state_quota, self._config.kv_state_ttl
            )
            self._ledger = Ledger(self._tokenizer, info, self._config.request_timeout)
        elif info.fingerprint != self.info.fingerprint:
            raise EngineDead("the model's files have changed since the start: restore them, or restart Octavo")
        await self._open_state_files()
        if num_live := len(self._ledger):
            log.warning("a new engine continues %d requests", num_live)
        self._readmission.engine_ready()

    def replica_lost(self, exit: Exit) -> None:
        assert self._ledger is not None
        self._fail_waiting(EngineDead(f"the engine ended ({exit.reason})"))
        if culprit := self._readmission.engine_lost(self._ledger, exit):
            reason = f"the engine failed {culprit.crashes} times while it served this request ({exit.reason})"
            log.error("the request %s is aborted: %s", culprit.id, reason)
            self._fail(culprit, RequestFailed(reason))

    def replica_message(self, message: FromEngine) -> None:
        match message:
            case Tokens():
                self._take_tokens(message.outputs)
            case Stats():
                if (answer := self._stats.get(message.id)) and not answer.done():
                    answer.set_result(message.stats)
            case StateDone():
                self._end_job(message)

    def _take_tokens(self, outputs: list[TokenOutput]) -> None:
        """Pass the tokens of a step on to the sinks."""
        assert self._ledger is not None
        live_before, ended, stopped = self._ledger.num_completions, 0, list[str]()
        for output in outputs:
            if (found := self._ledger.find(output.id)) is None:
                continue  # the request was aborted in the meantime
            live, completion = found
            if output.finish_reason in ("error", "timeout"):
                timed_out = output.finish_reason == "timeout"
                self._timed_out += timed_out
                failure = RequestTimeout if timed_out else RequestFailed
                self._fail(live, failure(output.message or "the engine could not continue this request"))
                continue
            try:
                increment = live.advance(completion, output)
            except Exception as error:
                log.exception("the request %s failed", live.id)
                self._fail(live, RequestFailed(f"{type(error).__name__}: {error}"))
                continue
            if completion.finish_reason:
                self._ledger.finish(completion)
                ended += 1
                if not output.finish_reason:  # a stop string ended it; the engine does not know stop strings
                    stopped.append(output.id)
            if live.progress < TRIAL_TOKENS:
                self._readmission.progressed(live)
            if increment.finished:
                self._remember(live)
                self._readmission.ended(live)
            self._deliver(live, increment)
        if stopped:
            self.replica.send(Abort(stopped))
        if self._admission is not None:
            self._admission.left(ended, live_before)

    # Inside

    def _living(self) -> Ledger:
        """Return the ledger. Raises EngineDead if this process, event loop or frontend cannot serve requests."""
        if os.getpid() != self._pid:
            raise EngineDead("this LLM belongs to the process that was forked: create one in this process")
        if self._loop is not None and asyncio.get_running_loop() is not self._loop:
            raise EngineDead("this LLM belongs to another event loop: create and use it within one asyncio.run")
        if self._closed or self._ledger is None:
            raise EngineDead("the engine was shut down" if self._closed else "call start() first")
        return self._ledger

    def _with_state(self, request: Request, tokens: list[int]) -> list[int]:
        if request.state is None:
            return tokens
        whole = self.states.use(request.state, request.terms.tenant, request.terms.cache_salt or "") + tokens
        check_length(len(whole), self.info)
        return whole

    def _send_request(self, live: LiveRequest) -> None:
        try:
            self.replica.send(Submit(live.owed()))
        except Exception as error:  # a request that cannot be encoded fails alone
            self._fail(live, InvalidRequest(f"the request cannot be sent: {error}"))

    def _deliver(self, live: LiveRequest, output: RequestOutput | Exception) -> None:
        try:
            live.sink(live, output)
        except Exception:
            log.exception("the sink of the request %s raised, so the request is aborted", live.id)
            self._close(live)

    def _fail(self, live: LiveRequest, error: Exception) -> None:
        if self._close(live):
            self._deliver(live, error)

    def _close(self, live: LiveRequest) -> bool:
        """End a request, here and in the engine. Return whether it was live."""
        assert self._ledger is not None
        live_before = self._ledger.num_completions
        engine_ids = self._ledger.close(live)
        if not engine_ids:
            return False
        if live.sent:
            self.replica.send(Abort(engine_ids))
        self._readmission.ended(live)
        self._count_left(live_before)
        return True

    def _count_left(self, live_before: int) -> None:
        assert self._ledger is not None
        if self._admission is not None:
            self._admission.left(live_before - self._ledger.num_completions, live_before)

    def _remember(self, live: LiveRequest) -> None:
        engine_request = live.completions[0].request
        outputs = [completion.token_ids for completion in live.completions]
        self.states.remember(
            live.id, engine_request.tenant, engine_request.salt, live.prompt_token_ids, outputs, live.state
        )

    def _watch_deadlines(self) -> None:
        """Schedule `_time_out` for the next deadline."""
        assert self._ledger is not None
        if (at := self._ledger.next_deadline) == self._deadline_at:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline_at = at
        if at is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_at(loop.time() + at - time.monotonic(), self._time_out)

    def _time_out(self) -> None:
        assert self._ledger is not None
        self._deadline_at = None
        for live in self._ledger.overdue():
            self._timed_out += 1
            message = f"the request did not end within its timeout of {live.timeout:g} seconds"
            self._fail(live, RequestTimeout(message))
        self._watch_deadlines()

    async def _open_state_files(self) -> None:
        """Open the files of loaded states in a new engine, before it gets requests that would recompute their pages."""
        loaded = self.states.loaded()
        jobs = [asyncio.ensure_future(self._job(LoadState(state.id, str(state.file)))) for state in loaded]
        if jobs:
            done, late = await asyncio.wait(jobs, timeout=FILE_PATIENCE)
            for job in done:
                job.exception()  # marked as retrieved: if a file is gone, its tokens are recomputed
            for state, job in zip(loaded, jobs, strict=True):
                if job in late:  # the file may make engines fail or hang, so the next engine does not open it
                    job.cancel()
                    state.file = None

    async def _job(self, message: LoadState | SaveState) -> None:
        if not self.replica.is_ready:
            raise EngineDead(f"the engine {self.replica.status}")
        self._jobs[message.id] = done = asyncio.get_running_loop().create_future()
        try:
            self.replica.send(message)
            await done
        finally:
            self._jobs.pop(message.id, None)

    def _end_job(self, message: StateDone) -> None:
        job = self._jobs.get(message.id)
        if job is None or job.done():
            return
        if message.failed is None:
            job.set_result(None)
        else:
            job.set_exception(message.failed.exception())

    def _fail_waiting(self, error: OctavoError) -> None:
        answers: list[asyncio.Future[Any]] = [*self._stats.values(), *self._jobs.values()]
        for answer in answers:
            if not answer.done():
                answer.set_exception(error)
