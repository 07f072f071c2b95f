"""An engine in this process: one thread steps it, another turns its tokens into text while the next step runs."""

import threading
from collections.abc import Callable, Iterable
from functools import partial
from queue import SimpleQueue

from octavo.engine.engine import Engine
from octavo.engine.messages import EngineInfo, EngineRequest, EngineStats, TokenOutput
from octavo.errors import EngineDead
from octavo.text import Tokenizer

from .ledger import Ledger, Sink
from .live import LiveRequest
from .prompts import Ask


class LocalEngine:
    """Thread-safe. Sinks are called from the delivery thread and must not block."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.info: EngineInfo = engine.info
        self._engine = engine
        self._ledger = Ledger(tokenizer, engine.info)
        self._ledger_lock = threading.Lock()
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

    def submit(self, asks: Iterable[Ask], sink: Sink) -> list[LiveRequest]:
        """Start requests, all or none. Raises InvalidRequest, PromptTooLong, EngineDead."""
        with self._ledger_lock:
            if self._dead or self._closing:
                raise EngineDead(f"the engine has stopped: {self._dead}" if self._dead else "the engine was shut down")
            lives, requests = self._ledger.open(asks, sink)
        self._tell(partial(self._add, requests))
        return lives

    def abort(self, ids: Iterable[str]) -> None:
        """End requests without a further word to their sinks. Finished ones are left alone."""
        with self._ledger_lock:
            engine_ids = [engine_id for id in ids for engine_id in self._ledger.close(id)]
        self._tell(partial(self._engine.abort, engine_ids))

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

    def _deliver_loop(self) -> None:
        while (outputs := self._outputs.get()) is not None:
            with self._ledger_lock:
                if isinstance(outputs, Exception):
                    self._dead = outputs
                    continue
                # Under the lock, so that the engine frees them before it hears of any later request.
                if stopped := self._ledger.deliver(outputs):
                    self._tell(partial(self._engine.abort, stopped))
        with self._ledger_lock:
            self._closing = True
            self._ledger.fail(EngineDead(f"the engine has stopped: {self._dead or 'it was shut down'}"))
