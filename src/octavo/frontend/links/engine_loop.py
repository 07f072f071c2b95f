"""EngineLoop: run one engine on messages, whichever link they come by."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from octavo.engine.engine import Engine

from .messages import (
    Abort,
    Alive,
    AskStats,
    Failed,
    FromEngine,
    LoadState,
    Pin,
    SaveState,
    StateDone,
    Stats,
    Submit,
    ToEngine,
    Tokens,
    Unpin,
)

Receive = Callable[[bool], list[ToEngine] | None]


class EngineLoop:
    """Takes in messages between steps, steps while there is work, and sends what comes of it.

    Args:
        engine: stepped by the thread that calls `run`, and by no other.
        send: delivers a message to the frontend; called by the same thread.
        wake: makes a blocked `receive` return; called by threads that do file I/O.
    """

    def __init__(self, engine: Engine, send: Callable[[FromEngine], None], wake: Callable[[], None]):
        self.engine = engine
        self._send, self._wake = send, wake
        self._step_started = 0.0  # time.monotonic(); 0 while there is nothing to do
        self._state_jobs: SimpleQueue[StateDone] = SimpleQueue()  # that have ended

    @property
    def alive(self) -> Alive:
        """How the present step comes on. May be read by any thread."""
        started = self._step_started
        return Alive(time.monotonic() - started if started else 0.0, self.engine.rows, *self.engine.slowest_step)

    def run(self, receive: Receive) -> None:
        """Serve until `receive` returns None, then return.

        Args:
            receive: returns the messages that have come since its last call; if its argument is True it waits until
                there is one, or until `wake`. None means that the frontend has gone.
        """
        while (messages := receive(not self.engine.has_work)) is not None:
            self._step_started = time.monotonic()
            for message in messages:
                self._take_in(message)
            self._finish_state_jobs()
            if self.engine.has_work and (outputs := self.engine.step()):
                self._send(Tokens(outputs))
            self._step_started = 0.0

    def _take_in(self, message: ToEngine) -> None:
        engine = self.engine
        match message:
            case Submit():
                for request in message.requests:
                    engine.add(request)
            case Abort():
                engine.abort(message.ids)
            case Pin():
                engine.pin(message.id, message.tokens, message.tenant, message.salt, message.origin)
            case Unpin():
                engine.unpin(message.id)
            case SaveState():
                state = (message.tokens, message.tenant, message.salt, message.origin)
                save = engine.save_state(Path(message.path), *state)
                save.add_done_callback(partial(self._state_job_ended, message.id))
            case LoadState():
                load = engine.load_state(message.id, Path(message.path))
                load.add_done_callback(partial(self._state_job_ended, message.id))
            case AskStats():
                self._send(Stats(message.id, engine.stats()))

    def _state_job_ended(self, id: str, job: "Future[Any]") -> None:
        """Called by a thread that does file I/O."""
        cancelled = Failed("EngineDead", "the engine has stopped")
        error = None if job.cancelled() else job.exception()
        self._state_jobs.put(StateDone(id, cancelled if job.cancelled() else Failed.of(error) if error else None))
        self._wake()

    def _finish_state_jobs(self) -> None:
        if self._state_jobs.empty():
            return
        self.engine.end_saves()
        while not self._state_jobs.empty():
            self._send(self._state_jobs.get())
