"""One engine process: started, talked to, waited for, ended."""

import asyncio
import contextlib
import dataclasses
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import zmq
import zmq.asyncio

from octavo import errors
from octavo.config import EngineConfig
from octavo.engine.messages import EngineInfo
from octavo.errors import EngineDead

from .wire import Failed, FromEngine, Load, Ready, ToEngine, decode_from_engine, encode


def raised(failed: Failed) -> Exception:
    """What was raised in the engine process."""
    error = getattr(errors, failed.error, EngineDead)(failed.message)
    assert isinstance(error, Exception)
    return error


class EngineProcess:
    """Starts with the constructor, so that it loads while the caller does other things."""

    def __init__(self, config: EngineConfig, path: Path):
        self._folder = Path(tempfile.mkdtemp(prefix="octavo-"))
        address = f"ipc://{self._folder / 'engine'}"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # nothing is dropped
        self._socket.bind(address)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "octavo.frontend.engine_main", address],
            stdin=subprocess.PIPE,  # held open as long as we live; see engine_main
            stdout=subprocess.DEVNULL,
        )
        self._exit: asyncio.Task[None] | None = None
        self._load = Load(dataclasses.asdict(config), str(path))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    async def ready(self) -> EngineInfo:
        """Wait until it has loaded. Raises what loading raised, or EngineDead."""
        self.send(self._load)
        message = await self.receive()
        if message is None:
            raise EngineDead(f"the engine process ended while loading (exit code {self.exit_code})")
        if isinstance(message, Failed):
            raise raised(message)
        assert isinstance(message, Ready)
        return message.info

    def send(self, message: ToEngine) -> None:
        """Never waits: ZeroMQ queues it, in order."""
        self._socket.send(encode(message))

    async def receive(self) -> FromEngine | None:
        """The next message; None when the process has ended and said all it had to say."""
        if self._exit is None:
            self._exit = asyncio.create_task(self._watch_exit())
        message = asyncio.ensure_future(self._socket.recv())
        try:
            await asyncio.wait((message, self._exit), return_when=asyncio.FIRST_COMPLETED)
            if not message.done():  # what it sent just before its end may still be on its way
                await asyncio.wait((message,), timeout=0.2)
            return decode_from_engine(message.result()) if message.done() else None
        finally:
            message.cancel()

    async def _watch_exit(self) -> None:
        """Ends with the process. A thread waits for it, since asyncio's child watchers depend on the loop in use."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait() -> None:
            self._process.wait()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
                loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=wait, name="octavo-watch-engine", daemon=True).start()
        await ended.wait()

    def end(self) -> None:
        """End it at once, and free what it used. It holds nothing that could not be rebuilt."""
        assert self._process.stdin is not None
        self._process.stdin.close()  # engine_main exits when it sees this
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)
