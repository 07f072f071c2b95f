"""What the main programs of ranks have in common (cpu/rank_main.py, cuda/rank_main.py)."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import msgspec

from octavo.formats.files import MANIFEST, unlock
from octavo.model import describe_model
from octavo.model.spec import DecoderSpec
from octavo.process_guard import end_with_parent, hide_memory, lock_memory
from octavo.weights import Checkpoint, open_checkpoint
from octavo.weights.tensor import Parameter

from .rank_process import HEARTBEAT, Failed, FromRank, Load, Loading, ToRank, receive

log = logging.getLogger("octavo")
M = TypeVar("M")


class Parent:
    """Rank 0, or a node's main program, as another rank sees it. When it ends for any reason, so does this process.

    Args:
        connection: a file descriptor: one end of a socket pair, of which the parent has the other.
    """

    def __init__(self, connection: int):
        for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as in the engine process
            signal.signal(ignored, signal.SIG_IGN)
        end_with_parent()
        self.is_loaded = threading.Event()  # ends the signs of life
        self._connection = socket.socket(fileno=connection)
        self._messages: SimpleQueue[ToRank] = SimpleQueue()
        threading.Thread(target=self._listen, name="octavo-rank", daemon=True).start()
        threading.Thread(target=self._beat, name="octavo-heartbeat", daemon=True).start()

    def next(self, kind: type[M]) -> M:
        """Wait for the next message, which is of this kind."""
        message = self._messages.get()
        assert isinstance(message, kind)
        return message

    def send(self, message: FromRank) -> None:
        self._connection.send(msgspec.msgpack.encode(message))

    def _listen(self) -> None:
        """Take in messages. End this process, whatever it is doing, when the parent ends."""
        while (message := receive(self._connection, ToRank)) is not None:
            self._messages.put(message)
        os._exit(0)

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the parent has ended
            while not self.is_loaded.wait(HEARTBEAT):
                self.send(Loading())


def run_rank(connection: int, load: Callable[[Load, Parent], Callable[[], None]]) -> int:
    """Load the part that the first message names, and follow rank 0. Return the exit code.

    Args:
        load: loads the part, up to its KV pool, and returns the function that follows rank 0.
    """
    parent = Parent(connection)
    message = parent.next(Load)
    try:
        follow = load(message, parent)
    except Exception as error:
        parent.send(Failed.of(error, f" (rank {message.rank})"))
        return 1
    parent.is_loaded.set()
    follow()
    return 0


def open_model(load: Load) -> tuple[Checkpoint, DecoderSpec, Mapping[str, Parameter]]:
    """Open the model of which a part is to be loaded, on the processors that the message names."""
    os.sched_setaffinity(0, load.cores)
    path = Path(load.path)
    if load.hide:
        hide_memory()
        if (path / MANIFEST).exists() and (reason := lock_memory()) is not None:
            log.warning("decrypted weights may be swapped to disk, since memory cannot be locked: %s", reason)
    checkpoint = open_checkpoint(unlock(path, load.identity))
    return (checkpoint, *describe_model(checkpoint.config, checkpoint.tensors))
