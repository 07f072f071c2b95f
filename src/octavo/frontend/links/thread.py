"""ThreadLink: an engine in a thread of this process, for `LLM`."""

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import load_engine
from octavo.engine.work_record import WorkRecord
from octavo.errors import OctavoError
from octavo.frontend.progress import loading_bar
from octavo.secret import Secrets

from .engine_loop import EngineLoop
from .link import Exit
from .messages import Failed, FromEngine, Ready, ToEngine

log = logging.getLogger("octavo")


class ThreadLink:
    """A Link to an engine in a thread. A thread cannot be killed, so an engine whose step hangs is not replaced."""

    pid: int | None = None
    heartbeats = False
    is_remote = False
    host = ""

    def __init__(self, config: EngineConfig, path: Path, secrets: Secrets):
        self.engine: Engine | None = None
        self._config, self._path, self._secrets = config, path, secrets
        self._inbox: SimpleQueue[ToEngine | None] = SimpleQueue()  # None wakes the loop
        self._closing = False
        self._exit = Exit("the engine was shut down", is_fault=False)
        self._work = WorkRecord()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)

    async def connect(self, on_message: Callable[[FromEngine], None], on_end: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message, self._on_end = on_message, on_end
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    async def close(self) -> None:
        await self.kill()

    async def kill(self) -> Exit:
        self._closing = True
        self._inbox.put(None)
        await self._ended.wait()
        return self._exit

    def _run(self) -> None:
        try:
            with loading_bar() as progress:
                self.engine = load_engine(self._config, self._path, progress, self._work, secrets=self._secrets)
            self._deliver(Ready(self.engine.info))
            EngineLoop(self.engine, self._deliver, lambda: self._inbox.put(None)).run(self._receive)
        except OctavoError as error:
            self._deliver(Failed.of(error))
        except Exception as error:
            log.exception("the engine failed")
            self._exit = Exit(f"{type(error).__name__}: {error}", is_fault=True, work=self._work.read())
        finally:
            if self.engine is not None:
                self.engine.close()
            self._call(self._end)

    def _end(self) -> None:
        self._ended.set()
        self._on_end()

    def _receive(self, block: bool) -> list[ToEngine] | None:
        """Return the messages that have arrived; see EngineLoop.run."""
        messages = []
        while not self._inbox.empty() or block:
            if (message := self._inbox.get()) is not None:
                messages.append(message)
            block = False
        return None if self._closing else messages

    def _deliver(self, message: FromEngine) -> None:
        self._call(lambda: self._closing or self._on_message(message))

    def _call(self, function: Callable[[], object]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the event loop is closed: so is the frontend
            self._closing = True
