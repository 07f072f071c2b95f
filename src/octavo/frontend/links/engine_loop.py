"""EngineLoop: run one engine, driven by messages from any link."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from octavo.engine.engine import Engine
from octavo.kv.page_map import page_states
from octavo.kv.prefix import KEY_BYTES
from octavo.tracing.records import IDLE

from .messages import (
    Abort,
    Alive,
    AskPageStates,
    AskStats,
    CacheReset,
    Failed,
    FromEngine,
    LoadState,
    Pages,
    PageStates,
    Pin,
    ResetCache,
    SaveState,
    StateDone,
    Stats,
    Submit,
    ToEngine,
    Tokens,
    Unpin,
    WatchPages,
)

ZERO = bytes(KEY_BYTES)
MANY_PAGES = 64  # whose fetch is estimated for the frontend
Receive = Callable[[bool], list[ToEngine] | None]


class EngineLoop:
    """Handles messages between steps, steps the engine while there is work, and sends the results.

    Args:
        engine: used only by the thread that calls `run`.
        send: delivers a message to the frontend; called by the same thread.
        wake: makes a blocked `receive` return; called by threads that do file I/O.
    """

    def __init__(self, engine: Engine, send: Callable[[FromEngine], None], wake: Callable[[], None]):
        self.engine = engine
        self._send, self._wake = send, wake
        self._step_started = 0.0  # time.monotonic(); 0 while there is nothing to do
        self._pages_sent = 0  # number of the next Pages message
        self._state_jobs: SimpleQueue[StateDone] = SimpleQueue()  # answers of jobs that have ended

    @property
    def alive(self) -> Alive:
        """Return a heartbeat with the progress of the current step. May be called by any thread."""
        started = self._step_started
        engine, seconds = self.engine, time.monotonic() - started if started else 0.0
        computed, sharing = engine.scheduler.recovery.seconds_per_token or 0.0, engine.kv.sharing
        fetched = 0.0 if sharing is None else sharing.seconds_per_page(MANY_PAGES) / engine.kv.page_size
        return Alive(seconds, engine.rows, *engine.slowest_step, computed, fetched)

    def run(self, receive: Receive) -> None:
        """Serve until `receive` returns None, then return.

        Args:
            receive: returns the messages that have arrived since its last call, or None if the frontend has ended. If
                its argument is True, it waits for a message or for `wake`.
        """
        while (messages := self._next(receive)) is not None:
            self._step_started = time.monotonic()
            for message in messages:
                self._take_in(message)
            self._finish_state_jobs()
            outputs = self.engine.step() if self.engine.has_work else []
            trace = self.engine.trace.take() if self.engine.trace is not None else b""
            events = self.engine.request_events.take()
            if outputs or trace or events:
                self._send(Tokens(outputs, trace, events))
            self._publish_pages()
            self._step_started = 0.0

    def _next(self, receive: Receive) -> list[ToEngine] | None:
        """Return the messages that have arrived; wait for one if the engine has no work."""
        trace = self.engine.trace
        if trace is None or self.engine.has_work:
            return receive(not self.engine.has_work)
        began = time.monotonic()
        messages = receive(True)
        trace.slice("wait for requests", IDLE, began)
        return messages

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
            case WatchPages():
                port = engine.serve_pages() if message.with_serving else 0
                self._send(Pages(0, b"".join(engine.kv.watch(message.with_content)), port=port))
                self._pages_sent = 1
            case AskStats():
                self._send(Stats(message.id, engine.stats()))
            case AskPageStates():
                self._send(PageStates(message.id, page_states(engine.kv)))
            case ResetCache():
                self._send(CacheReset(message.id, engine.reset_cache()))

    def _publish_pages(self) -> None:
        engine = self.engine
        gained, lost = engine.kv.take_changes()
        if gained or lost:
            known = engine.kv.take_content(gained)
            keys, content = [*known, *(key for key in gained if key not in known)], known.values()
            usual = engine.usual_root if content else ZERO
            pages = Pages(
                self._pages_sent,
                b"".join(keys),
                b"".join(lost),
                parents=b"".join(ZERO if page.parent == page.root else page.parent for page in content),
                roots=b"".join(ZERO if page.root == usual else page.root for page in content),
                tokens=b"".join(page.tokens for page in content),
            )
            self._send(pages)
            self._pages_sent += 1

    def _state_job_ended(self, id: str, job: "Future[Any]") -> None:
        """Queue the answer to a SaveState or LoadState message. Called by a thread that does file I/O."""
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
