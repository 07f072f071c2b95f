"""ProcessLink: an engine in a separate process, which may crash or be killed without harm to this process."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from octavo.config import EngineConfig
from octavo.engine.work_record import WorkRecord
from octavo.kv.peers.access import PeerAccess
from octavo.machine import memory_kills
from octavo.secret import Secrets, without_secrets

from .link import Exit
from .messages import FrameReader, FromEngine, Load, ToEngine, decode_from_engine, frame

LOCAL = "127.0.0.1"
CLOSE_PATIENCE = 5.0  # seconds for an engine to end cleanly
LOOK = 0.01  # seconds between checks whether a process has ended
KILL_PATIENCE = 2.0  # seconds for the kernel to end a killed process

log = logging.getLogger("octavo")


class EngineProcess:
    """A new process, which imports the engine's modules and then waits for a Load message from a ProcessLink.

    The two processes share a socket pair, which has no name, file or port to which others could connect. Raises OSError
    if the process cannot be started.
    """

    def __init__(self) -> None:
        self.memory_kills = memory_kills()  # counter before the process starts
        work = WorkRecord.share()
        try:
            self.work = WorkRecord(work)
            self.socket, theirs = socket.socketpair()
        except BaseException:
            os.close(work)
            raise
        try:
            self.popen = subprocess.Popen(
                # -P: files in the current folder must not shadow modules.
                [sys.executable, "-P", "-m", "octavo.frontend.links.engine_main", str(theirs.fileno()), str(work)],
                pass_fds=[theirs.fileno(), work],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=without_secrets(),
            )
        except BaseException:
            self.socket.close()
            raise
        finally:
            theirs.close()
            os.close(work)

    def end(self) -> None:
        """Kill the process and wait for its end."""
        self.popen.kill()
        self.popen.wait(KILL_PATIENCE)
        self.socket.close()


class ProcessLink:
    """A Link to an engine process. Raises OSError if the process cannot be started.

    Args:
        process: the process to use; by default a new one.
        replica: the number of the replica among the data_parallel_size ones of the model.
        secrets: the secrets that `config` names. They are sent in the first message.
        access: for pages from engine to engine.
    """

    heartbeats = True
    is_remote = False
    host = LOCAL

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        process: EngineProcess | None = None,
        replica: int = 0,
        secrets: Secrets = Secrets(),  # noqa: B008 (immutable)
        access: PeerAccess | None = None,
    ):
        self._process = process or EngineProcess()
        self.pid: int = self._process.popen.pid
        self._transport: asyncio.Transport | None = None
        self._protocol: _Frames | None = None
        with contextlib.suppress(ConnectionError):  # the process has ended already, which `connect` reports
            load = Load(dataclasses.asdict(config), str(path), replica, config.data_parallel_size, secrets, access)
            self._process.socket.sendall(frame(load))

    async def connect(self, on_message: Callable[[FromEngine], None], on_end: Callable[[], None]) -> None:
        self._protocol = protocol = _Frames(on_message, on_end)
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_unix_connection(lambda: protocol, sock=self._process.socket)

    def send(self, message: ToEngine) -> None:
        data = frame(message)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def close(self) -> None:
        self._disconnect()
        if not await self._wait(CLOSE_PATIENCE):
            await self.kill()

    async def kill(self) -> Exit:
        if self._transport is None or not self._transport.is_closing() or not await self._wait(KILL_PATIENCE):
            self._process.popen.kill()
            await self._wait(KILL_PATIENCE)
        self._disconnect()
        return self._exit(self._process.popen.poll())

    def _disconnect(self) -> None:
        if self._protocol is not None:
            self._protocol.detach()
        if self._transport is not None:
            self._transport.close()
        else:
            self._process.socket.close()

    def discard(self) -> None:
        """End a process to which `connect` was never called. Needs no event loop."""
        if self._protocol is None:
            self._process.end()

    async def _wait(self, seconds: float) -> bool:
        """Wait for the process to end. Return whether it has."""
        deadline, poll = time.monotonic() + seconds, self._process.popen.poll
        while poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(LOOK)
        return poll() is not None

    def _exit(self, code: int | None) -> Exit:
        work = self._process.work.read()
        if code is None:
            return Exit("the process does not end", is_fault=False, work=work)
        if code >= 0:
            return Exit(f"exit code {code}", is_fault=True, work=work)
        if -code == signal.SIGKILL and memory_kills() > self._process.memory_kills:
            return Exit("killed by SIGKILL when memory had run out", is_fault=True, work=work)
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return Exit(f"killed by {name}", is_fault=-code != signal.SIGKILL, work=work)


class _Frames(asyncio.Protocol):
    """Decodes the messages that an engine sends."""

    def __init__(self, on_message: Callable[[FromEngine], None], on_end: Callable[[], None]):
        self._on_message: Callable[[FromEngine], None] | None = on_message
        self._on_end: Callable[[], None] | None = on_end
        self._frames = FrameReader()

    def detach(self) -> None:
        """Stop delivering messages."""
        self._on_message = self._on_end = None

    def data_received(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            if self._on_message is not None:
                self._on_message(decode_from_engine(payload))

    def connection_lost(self, _: Exception | None) -> None:
        if self._on_end is not None:
            self._on_end()
        self.detach()
