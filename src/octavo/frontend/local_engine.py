"""An engine in this process: one thread steps it, another turns its tokens into text while the next step runs."""

import contextlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.messages import EngineInfo, EngineRequest, EngineStats, TokenOutput
from octavo.errors import EngineDead
from octavo.states import KVState, StateBook
from octavo.states.file import read_saved_tokens
from octavo.text import Tokenizer

from .ledger import Ledger, Sink
from .live import LiveRequest
from .prompts import Ask


class LocalEngine:
    """Thread-safe. Sinks are called from the delivery thread and must not block."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: EngineConfig):
        self.info: EngineInfo = engine.info
        self.states = StateBook(self, engine.info.fingerprint, config.kv_state_quota, config.kv_state_ttl)
        self._engine = engine
        self._ledger = Ledger(tokenizer, engine.info, self.states)
        self._ledger_lock = threading.Lock()  # of the states, too
        self._answers: set[Future[None]] = set()  # that threads wait for
        self._inbox: list[Callable[[], None]] = []  # what the engine's thread is to do before its next step
        self._wake = threading.Condition()
        self._closing = False
        self._dead: Exception | None = None
        self._outputs: SimpleQueue[list[TokenOutput] | Exception | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._step_loop, name="octavo-engine", daemon=True),
            threading.Thread(target=self._deliver_loop, name="octavo-outputs", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, asks: list[Ask], sink: Sink) -> list[LiveRequest]:
        """Start requests, all or none. Raises InvalidRequest, PromptTooLong, InvalidKVState, EngineDead."""
        with self._ledger_lock:
            self._check_alive()
            lives, requests = self._ledger.open(asks, sink)
        self._tell(partial(self._add, requests))
        return lives

    def abort(self, ids: Iterable[str]) -> None:
        """End requests without a further word to their sinks. Finished ones are left alone."""
        with self._ledger_lock:
            engine_ids = [engine_id for id in ids for engine_id in self._ledger.close(id)]
        self._tell(partial(self._engine.abort, engine_ids))

    def keep_state(self, request_id: str, index: int) -> KVState:
        """A state of a finished request. Raises InvalidRequest, QuotaExceeded."""
        with self._ledger_lock:
            return self._ledger.keep_state(request_id, index)

    def load_state(self, path: Path, tenant: str, salt: str) -> KVState:
        """A state that was saved. Raises InvalidKVState, QuotaExceeded, EngineDead."""
        tokens = read_saved_tokens(path, self.info.fingerprint, self.info.vocab_size, tenant, salt)
        with self._ledger_lock:
            state = self.states.adopt(path, tokens, tenant, salt)
        try:
            self._await_job(partial(self._engine.load_state, state.id, path))
        except BaseException:
            state.drop()
            raise
        return state

    def save_state(self, state: KVState, path: Path) -> None:
        """Returns when it is written. Raises InvalidKVState, RequestFailed, EngineDead."""
        with self._ledger_lock:
            tokens = self.states.use(state, state.tenant, state.salt)
        self._await_job(partial(self._engine.save_state, path, tokens, state.tenant, state.salt, state.origin))

    def drop_state(self, state: KVState) -> None:
        with self._ledger_lock:
            self.states.drop(state)

    def pin_state(self, state: KVState) -> None:
        self._tell(partial(self._engine.pin, state.id, state.token_ids, state.tenant, state.salt, state.origin))

    def unpin_state(self, state: KVState) -> None:
        self._tell(partial(self._engine.unpin, state.id))

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        """Stop the threads after the step at hand and free the engine. Live requests get EngineDead."""
        with self._wake:
            if self._closing:
                return
            self._closing = True
            self._wake.notify()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _check_alive(self) -> None:
        if self._dead or self._closing:
            raise EngineDead(f"the engine has stopped: {self._dead}" if self._dead else "the engine was shut down")

    def _await_job(self, begin: "Callable[[], Future[Any]]") -> None:
        """Have the engine's thread begin a job of its I/O threads, and wait for the end. Raises what that raises."""
        answer: Future[None] = Future()
        with self._ledger_lock:
            self._check_alive()
            self._answers.add(answer)
        self._tell(lambda: begin().add_done_callback(partial(self._end_job, answer)))
        try:
            answer.result()
        finally:
            self._answers.discard(answer)

    def _end_job(self, answer: "Future[None]", job: "Future[Any]") -> None:
        self._tell(self._engine.end_saves)
        error = EngineDead("the engine has stopped") if job.cancelled() else job.exception()
        with contextlib.suppress(InvalidStateError):  # the engine has stopped, and whoever waited was told so
            if error:
                answer.set_exception(error)
            else:
                answer.set_result(None)

    def _add(self, requests: list[EngineRequest]) -> None:
        for request in requests:
            self._engine.add(request)

    def _tell(self, task: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(task)
            self._wake.notify()

    def _step_loop(self) -> None:
        try:
            while self._work():
                if outputs := self._engine.step():
                    self._outputs.put(outputs)
        except Exception as error:  # whatever it was, nobody may be left waiting
            self._outputs.put(error)
        finally:
            self._engine.close()
            self._outputs.put(None)

    def _work(self) -> bool:
        """Wait for something to do and take in what was told. False when it is time to stop."""
        with self._wake:
            while not (self._inbox or self._closing or self._engine.has_work):
                self._wake.wait()
            tasks, self._inbox = self._inbox, []
        for task in tasks:
            task()
        return not self._closing

    def _deliver(self, outputs: list[TokenOutput] | Exception) -> None:
        with self._ledger_lock:
            if isinstance(outputs, Exception):
                self._dead = outputs
            # Under the lock, so that the engine frees them before it hears of any later request.
            elif stopped := self._ledger.deliver(outputs):
                self._tell(partial(self._engine.abort, stopped))

    def _deliver_loop(self) -> None:
        try:
            while (outputs := self._outputs.get()) is not None:
                self._deliver(outputs)
        except Exception as error:  # here as well
            self._dead = error
        with self._wake:
            self._closing = True
            self._wake.notify()
        with self._ledger_lock:
            dead = EngineDead(f"the engine has stopped: {self._dead or 'it was shut down'}")
            self._ledger.fail(dead)
            for answer in list(self._answers):
                with contextlib.suppress(InvalidStateError):
                    answer.set_exception(dead)
