"""Members and RankProcess: the processes over which a model is divided, as their parent sees them, and their messages.

Messages are for loading only: steps take other ways. A socket pair carries them, so each side notices at once when the
other ends.
"""

import contextlib
import selectors
import signal
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
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
OnEnd = Callable[[int, str], None]  # told that a member has ended by itself: its exit code, and a line about it


class Load(msgspec.Struct, frozen=True, tag=True):
    """Load a part of a model.

    Attributes:
        path: the model's directory or .gguf file.
        identity: the age identity that opens it, if it is encrypted.
        hide: whether to hide the memory of the process (process_guard.py).
        cores: the processors to run on.
        settings: the arguments with which the backend loads the part.
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


class Join(msgspec.Struct, frozen=True, tag=True):
    """All parts are loaded: connect to the other ranks (GPUs only)."""


class Joined(msgspec.Struct, frozen=True, tag=True):
    """The rank can take steps, once the KV pool is allocated.

    Attributes:
        step_bytes: see Footprint.
        total, free: bytes of its GPU's memory.
        arithmetic: see Backend.
        kernels: see Footprint; it names the GPU.
    """

    step_bytes: int
    total: int
    free: int
    arithmetic: str
    kernels: str


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
    def of(cls, error: Exception, where: str = "") -> "Failed":
        name, text = errors.to_line(error)
        return cls(name, text + where)

    def exception(self) -> Exception:
        return errors.from_line(self.name, self.text)


ToRank = Load | Join | Allocate
FromRank = Loading | Loaded | Joined | Allocated | Failed


def receive(connection: socket.socket, kind: Any) -> Any:
    """Return the next message, or None if the other process has ended."""
    try:
        content = connection.recv(LONGEST)
    except ConnectionResetError:
        return None
    return msgspec.msgpack.decode(content, type=kind) if content else None


class Member(ABC):
    """Whoever loads parts of the model for this process: another process, or another node (nodes.RemoteNode).

    Args:
        name: such as "rank 1", for errors.

    Attributes:
        messages: those that have arrived; None when the member has ended.
        failed: why loading has failed, if the member has said so.
    """

    def __init__(self, name: str):
        self.name = name
        self.messages: SimpleQueue[FromRank | None] = SimpleQueue()
        self.failed: Failed | None = None

    @abstractmethod
    def fileno(self) -> int:
        """Return the file descriptor that is readable when a message has arrived."""

    @abstractmethod
    def send(self, message: Any) -> None:
        """Send a message. One to a member that has ended is dropped: `messages` tells."""

    @abstractmethod
    def receive(self) -> Any:
        """Return the next message, or None if the member has ended."""

    @abstractmethod
    def wait(self) -> tuple[int, str]:
        """Return how the member ended: its exit code, negative for a signal; and in words."""

    @abstractmethod
    def hang_up(self) -> None:
        """End the connection, for both sides. The member notices that and ends."""

    @abstractmethod
    def end(self) -> None:
        """End the member, and wait for that if it is a process."""

    def take_in(self) -> bool:
        """Receive a message into `messages`. Return False if the member has ended."""
        message = self.receive()
        if isinstance(message, Failed):
            self.failed = message
        self.messages.put(message)
        return message is not None

    def next(self) -> Loaded | Joined | Allocated:
        """Wait for the next message, but Loading.

        Raises what `error` returns if loading has failed or the member has ended, and EngineDead if it is silent for
        too long.
        """
        message: FromRank | None = Loading()
        while isinstance(message, Loading):
            try:
                message = self.messages.get(timeout=SILENCE)
            except Empty:
                raise errors.EngineDead(f"{self.name} has not answered for {SILENCE:g} seconds") from None
        if message is None or isinstance(message, Failed):
            raise self.error()
        return message

    def error(self) -> Exception:
        """Return why the member has ended while it loaded."""
        if self.failed is not None:
            return self.failed.exception()
        _, how = self.wait()  # which may change the name
        return errors.EngineDead(f"{self.name} has ended while it loaded: {how}")


class RankProcess(Member):
    """A new process that imports its modules, and then waits for Load. Raises OSError if it cannot be started.

    Args:
        module: what it runs. The arguments are numbers: the file descriptors of its connection, and of `files`.
        files: file descriptors that it gets; -1 stands for none.
    """

    def __init__(self, rank: int, module: str, files: Sequence[int]):
        super().__init__(f"rank {rank}")
        self.rank = rank
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            numbers = [theirs.fileno(), *files]
            self._popen = subprocess.Popen(
                # -P: files in the current folder must not shadow modules.
                [sys.executable, "-P", "-m", module, *map(str, numbers)],
                pass_fds=[number for number in numbers if number >= 0],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=without_secrets(),
            )

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: ToRank) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(msgspec.msgpack.encode(message))

    def receive(self) -> FromRank | None:
        message: FromRank | None = receive(self.connection, FromRank)
        return message

    def wait(self) -> tuple[int, str]:
        """Kill the process if it does not end by itself; see Member.wait."""
        try:
            code = self._popen.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            code = self._popen.wait()
        named = -code in set(signal.Signals)
        return code, f"killed by {signal.Signals(-code).name}" if named else f"exit code {code}"

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self.connection.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        self.hang_up()
        self.wait()
        self.connection.close()


class Members:
    """Those who load parts of a model for this process. Another thread takes in their messages, and notices their end.

    Args:
        on_end: called, in that thread, when a member has ended by itself, before the steps of the others fail: its
            exit code, and a line about it. Not if it has said that loading failed: then `wait` and `check` raise its
            error.

    Attributes:
        ended: the first member that has ended by itself.
    """

    def __init__(self, members: Sequence[Member], on_end: OnEnd | None):
        self.members = list(members)
        self.ended: Member | None = None
        self._on_end, self._ending = on_end, False
        self._thread = threading.Thread(target=self._watch, name="octavo-ranks", daemon=True)
        self._thread.start()

    def send(self, message: Join | Allocate) -> None:
        for member in self.members:
            member.send(message)

    def wait(self) -> list[Any]:
        """Wait for a message of every member, and return them. Raises OctavoError if one has failed or ended."""
        return [member.next() for member in self.members]

    def check(self) -> None:
        """Raise the error of a member that has ended while it loaded."""
        if self.ended is not None:
            raise self.ended.error()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """End all if loading fails in the block. Raises the error of the member that has ended first, if one has."""
        try:
            yield
        except BaseException as error:
            ended = self.first_ended(error)
            self.end()
            if ended is not None and isinstance(error, Exception):
                raise ended.error() from None  # the first cause: the others fail because one has ended
            raise

    def first_ended(self, error: BaseException) -> Member | None:
        """Return the member whose end may be the cause of an error."""
        return self.ended

    def stop(self) -> None:
        """Make the steps of all return, and all processes end."""
        self._ending = True
        self.stop_steps()
        for member in self.members:
            member.hang_up()

    def end(self) -> None:
        """Do as `stop`, and wait until all have ended."""
        self.stop()
        self._thread.join()
        for member in self.members:
            member.end()

    def stop_steps(self) -> None:
        """Make the steps that run return, in all members and in this process."""

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for member in self.members:
                selector.register(member, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    if not key.fileobj.take_in():  # type: ignore[union-attr]
                        selector.unregister(key.fileobj)
                        self._has_ended(key.fileobj)  # type: ignore[arg-type]

    def _has_ended(self, member: Member) -> None:
        if self._ending:
            return
        code, how = member.wait()
        self.ended = self.ended or member
        if member.failed is None and self._on_end is not None and not self._ending:
            self._on_end(code, f"{member.name} has ended: {how}")
        self.stop_steps()
