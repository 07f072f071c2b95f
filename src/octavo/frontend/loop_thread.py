"""LoopThread: an event loop in a separate thread, for callers without an event loop."""

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from octavo.errors import EngineDead

Result = TypeVar("Result")

LOOK = 1.0  # seconds between checks whether the thread still runs


class LoopThread:
    """Runs functions and coroutines of any thread on its loop. `run` and `call` raise EngineDead after `close`."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="octavo-frontend", daemon=True)
        self._thread.start()
        self._started.wait()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine and wait for its result."""
        try:
            self._check()
            assert self._loop is not None
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:
            coroutine.close()
            raise error if isinstance(error, EngineDead) else EngineDead("the engine was shut down") from None
        while True:
            try:
                return future.result(LOOK)
            except TimeoutError:
                if future.done():
                    raise
                self._check()
            except concurrent.futures.CancelledError:
                raise EngineDead("the engine was shut down") from None

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function on the loop and wait for its result."""

        async def call() -> Result:
            return function(*arguments)

        return self.run(call())

    def post(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Schedule a function call on the loop. Takes no lock and never waits, so finalizers may call it."""
        if os.getpid() == self._pid and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and everything on it has ended
                self._loop.call_soon_threadsafe(function, *arguments)

    def close(self) -> None:
        """Stop the loop soon, and cancel the tasks that still run on it."""
        self.post(lambda: self._stop.set())

    def join(self, seconds: float) -> None:
        """Wait for the thread to end after `close`."""
        self._thread.join(seconds)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        await self._stop.wait()

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise EngineDead("this LLM belongs to the process that was forked: create one in this process")
        if not self._thread.is_alive():
            raise EngineDead("the engine was shut down")
