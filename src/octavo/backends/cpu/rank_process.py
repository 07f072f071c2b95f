"""RankProcess: one of the processes over which a model is divided, as rank 0 sees it, and the messages between them.

Messages are for loading only: steps go through shared memory. A socket pair carries them, so each side notices at once
when the other ends.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from octavo import errors
from octavo.secret import without_secrets

LONGEST = 1 << 16  # bytes of a message
HEARTBEAT = 1.0  # seconds between Loading messages
SILENCE = 60.0  # seconds without a message after which a rank that loads is given up; importing modules takes some
_PATIENCE = 2.0  # seconds for a process to end

Settings = dict[str, Any]


class Load(msgspec.Struct, frozen=True, tag=True):
    """Load a part of a model.

    Attributes:
        path: the model's directory or .gguf file.
        identity: the age identity that opens it, if it is encrypted.
        hide: whether to hide the memory of the process (process_guard.py).
        cores: the processors to run on.
        settings: the arguments of load_shard.
    """

    path: str
    identity: str | None
    hide: bool
    rank: int
    size: int
    cores: list[int]
    settings: Settings


class Loading(msgspec.Struct, frozen=True, tag=True):
    """The rank is alive."""


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The part is loaded; see Footprint."""

    weight_bytes: int
    page_bytes: int


class Allocate(msgspec.Struct, frozen=True, tag=True):
    """Allocate the KV pool, then follow the steps of rank 0."""

    pages: int


class Allocated(msgspec.Struct, frozen=True, tag=True):
    """The KV pool is allocated."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Loading failed (see errors.to_line)."""

    name: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> "Failed":
        return cls(*errors.to_line(error))

    def exception(self, rank: int) -> Exception:
        return errors.from_line(self.name, f"{self.text} (rank {rank})")


ToRank = Load | Allocate
FromRank = Loading | Loaded | Allocated | Failed


def receive(connection: socket.socket, kind: Any) -> Any:
    """Return the next message, or None if the other process has ended."""
    try:
        content = connection.recv(LONGEST)
    except ConnectionResetError:
        return None
    return msgspec.msgpack.decode(content, type=kind) if content else None


class RankProcess:
    """A new process that imports its modules, and then waits for Load. Raises OSError if it cannot be started.

    Args:
        memory: file descriptors of the memory that it shares: those of program.Place.

    Attributes:
        messages: those that have arrived; None when the process has ended.
        failed: why loading has failed, if the process has said so.
    """

    def __init__(self, rank: int, memory: Sequence[int]):
        self.rank = rank
        self.messages: SimpleQueue[FromRank | None] = SimpleQueue()
        self.failed: Failed | None = None
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._popen = subprocess.Popen(
                # -P: files in the current folder must not shadow modules.
                [sys.executable, "-P", "-m", "octavo.backends.cpu.rank_main", *map(str, (theirs.fileno(), *memory))],
                pass_fds=[theirs.fileno(), *memory],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=without_secrets(),
            )

    def send(self, message: ToRank) -> None:
        """Send a message. One to a process that has ended is dropped: `messages` tells."""
        with contextlib.suppress(OSError):
            self.connection.send(msgspec.msgpack.encode(message))

    def take_in(self) -> bool:
        """Receive a message into `messages`. Return False if the process has ended."""
        message = receive(self.connection, FromRank)
        if isinstance(message, Failed):
            self.failed = message
        self.messages.put(message)
        return message is not None

    def next(self) -> Loaded | Allocated:
        """Wait for the next message, but Loading.

        Raises what `error` returns if loading has failed or the process has ended, and EngineDead if it is silent for
        too long.
        """
        message: FromRank | None = Loading()
        while isinstance(message, Loading):
            try:
                message = self.messages.get(timeout=SILENCE)
            except Empty:
                raise errors.EngineDead(f"rank {self.rank} has not answered for {SILENCE:g} seconds") from None
        if message is None or isinstance(message, Failed):
            raise self.error()
        return message

    def error(self) -> Exception:
        """Return why the process has ended while it loaded."""
        if self.failed is not None:
            return self.failed.exception(self.rank)
        return errors.EngineDead(f"rank {self.rank} has ended while it loaded: {self.wait()[1]}")

    def wait(self) -> tuple[int, str]:
        """Return how the process ended: its exit code, negative for a signal; and in words. Kill it if it has not."""
        try:
            code = self._popen.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            code = self._popen.wait()
        named = -code in set(signal.Signals)
        return code, f"killed by {signal.Signals(-code).name}" if named else f"exit code {code}"

    def hang_up(self) -> None:
        """End the connection, for both sides. The process notices that and ends."""
        with contextlib.suppress(OSError):  # it has ended already
            self.connection.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """End the process."""
        self.hang_up()
        self.wait()
        self.connection.close()


def share_memory(name: str) -> int:
    """Return a file descriptor of memory that processes can share. It takes physical memory once it is written."""
    file = os.memfd_create(f"octavo-{name}", os.MFD_CLOEXEC)
    os.ftruncate(file, 1 << 40)
    return file
