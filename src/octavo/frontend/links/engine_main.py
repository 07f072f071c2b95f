"""The main program of an engine process: `python -P -m octavo.frontend.links.engine_main FD WORK`.

ProcessLink starts it. FD is one end of a socket pair, of which the frontend has the other end: when the frontend's
process ends for any reason, so does this one. WORK is the file descriptor of a WorkRecord.
"""

import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from octavo.errors import OctavoError

from .messages import (
    HEARTBEAT,
    Alive,
    Failed,
    FrameReader,
    FromEngine,
    Load,
    Loading,
    Ready,
    ToEngine,
    Tokens,
    decode_to_engine,
    frame,
)

RECEIVE_BYTES = 1 << 20
SECONDS_TO_CLOSE = 3.0  # time to finish writing pages to a disk

log = logging.getLogger("octavo")


class Connection:
    """The engine's end of the socket pair. `send` may be called by any thread, `receive` by one."""

    def __init__(self, fd: int):
        self.socket = socket.socket(fileno=fd)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._frames = FrameReader()
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(self.socket, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def send(self, message: FromEngine) -> None:
        with self._lock:
            self.socket.sendall(frame(message))

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    def receive(self, block: bool) -> list[ToEngine] | None:
        """Return the messages that have arrived; see EngineLoop.run."""
        messages: list[ToEngine] = []
        while ready := self._poll.poll(None if block else 0):
            block = False
            for fd, _ in ready:
                if fd == self._wake:
                    os.eventfd_read(self._wake)
                elif not (data := self.socket.recv(RECEIVE_BYTES)):
                    return None
                else:
                    messages += self._decode(data)
        return messages

    def _decode(self, data: bytes) -> list[ToEngine]:
        messages = []
        for payload in self._frames.feed(data):
            message, failures = decode_to_engine(payload)
            if failures:
                self.send(Tokens(failures))
            if message is not None:
                messages.append(message)
        return messages


class Heartbeat(threading.Thread):
    """Sends heartbeats with the duration of the current step. Ends this process when the frontend ends."""

    def __init__(self, connection: Connection):
        super().__init__(name="octavo-heartbeat", daemon=True)
        from .engine_loop import EngineLoop

        self.loop: EngineLoop | None = None  # set when the model is loaded
        self._connection = connection

    def run(self) -> None:
        hangup = select.poll()
        hangup.register(self._connection.socket, select.POLLRDHUP)
        try:
            while not hangup.poll(HEARTBEAT * 1000):
                loop = self.loop
                self._connection.send(loop.alive if loop else Alive())
        except OSError:
            pass
        if self.loop is not None:
            # The main thread notices this too and ends. If it cannot, because a step hangs, end the process anyway.
            time.sleep(SECONDS_TO_CLOSE + 1)
            self.loop.engine.end_transfers()
        os._exit(0)


def main(fd: int, work: int) -> int:
    """Load the model that the first message names, and serve it. Return the exit code."""
    # Ignore signals: Ctrl-C or SIGTERM for the whole process group must not end this process while the server drains.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    os.set_inheritable(fd, False)
    connection = Connection(fd)
    heartbeat = Heartbeat(connection)
    heartbeat.start()
    try:
        _serve(connection, heartbeat, work)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the frontend has ended
    except OctavoError as error:
        connection.send(Failed.of(error))
        return 1
    except Exception as error:
        log.exception("the engine failed")
        connection.send(Failed.of(error))
        return 1
    return 0


def _serve(connection: Connection, heartbeat: Heartbeat, work: int) -> None:
    gc.disable()  # until the model is loaded: imports make no garbage, and the collector would scan them
    # Imported here because the heartbeat must begin first, and before the first message to save time.
    from octavo.config import EngineConfig
    from octavo.engine.loading import load_engine
    from octavo.engine.work_record import WorkRecord
    from octavo.formats.files import MANIFEST
    from octavo.frontend.progress import loading_bar
    from octavo.machine import share_of_cores

    from .engine_loop import EngineLoop

    messages: list[ToEngine] | None = []
    while not messages:
        if (messages := connection.receive(block=True)) is None:
            return
    [load] = messages
    assert isinstance(load, Load)
    reported = time.monotonic()
    config = EngineConfig(**load.config)
    if load.replicas > 1:
        config = config.share(load.replica, load.replicas)
        os.sched_setaffinity(0, share_of_cores(load.replica, load.replicas))  # of this thread, and those that it starts

    if load.secrets or config.secret_file is not None:
        _guard((Path(load.path) / MANIFEST).exists())
    with loading_bar() as show:

        def progress(done: int, total: int) -> None:
            nonlocal reported
            show(done, total)
            if time.monotonic() - reported > HEARTBEAT:
                reported = time.monotonic()
                connection.send(Loading(done, total))

        engine = load_engine(
            config,
            Path(load.path),
            progress,
            WorkRecord(work),
            load.replicas,
            load.secrets,
            _end_like_rank,
            load.access,
            load.replica,
        )
    loop = EngineLoop(engine, connection.send, connection.wake)
    heartbeat.loop = loop
    gc.enable()
    gc.freeze()  # loaded objects stay; otherwise the collector would scan them during steps
    connection.send(Ready(engine.info))
    loop.run(connection.receive)
    engine.close()


def _end_like_rank(code: int, line: str) -> None:
    """End this process as one of its ranks has ended, so that the frontend finds the same cause."""
    log.error("%s, and its engine with it", line)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code or 1)


def _guard(lock: bool) -> None:
    """Hide the memory of this process.

    Args:
        lock: whether to keep it from being swapped to disk too, as the weights of an encrypted model must be.
    """
    from octavo.process_guard import hide_memory, lock_memory

    hide_memory()
    if lock and (reason := lock_memory()) is not None:
        log.warning("decrypted weights may be swapped to disk, since memory cannot be locked: %s", reason)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
