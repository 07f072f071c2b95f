"""WorkRecord: a record of an engine's current work, in memory that outlives its process."""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

_SIZE = 1 << 16
_UNKNOWN, _ONE, _STEP = 0, 1, 2  # the first byte; then the length of the ids (uint32) and the ids, one per line
_LENGTH = slice(1, 5)
_START = 5


@dataclass(frozen=True, slots=True)
class Work:
    """The work that an engine was doing when it ended.

    Attributes:
        alone: if the engine or a policy ran code for one request alone, the id of the request; otherwise None.
        prompts: if a step was being computed, the ids of the requests whose prompts were in it; all decoding requests
            were in it too. None if no step was being computed.
    """

    alone: str | None = None
    prompts: tuple[str, ...] | None = None


class WorkRecord:
    """A record of an engine's current work, which its frontend reads after a crash to find the request that caused it.

    Writing takes about a microsecond. Only one thread may write; call `read` only after this thread has ended.

    Args:
        fd: a file descriptor of shared memory, from `share`; by default memory of this process is used.
    """

    def __init__(self, fd: int | None = None):
        self._memory: mmap.mmap | bytearray = bytearray(_SIZE) if fd is None else mmap.mmap(fd, _SIZE)

    @staticmethod
    def share() -> int:
        """Return a file descriptor of new shared memory for a record. Raises OSError."""
        fd = os.memfd_create("octavo-work-record")
        os.ftruncate(fd, _SIZE)
        return fd

    def serving(self, id: str) -> None:
        """Note that code runs for this request alone."""
        self._note(_ONE, id)

    def computing(self, prompts: Sequence[str]) -> None:
        """Note that a step is computed, which has prompts of these requests."""
        self._note(_STEP, "\n".join(prompts))

    def nothing(self) -> None:
        """Note that the engine runs code that belongs to no particular request."""
        self._memory[0] = _UNKNOWN

    def read(self) -> Work:
        """Return the latest note."""
        kind, size = self._memory[0], int.from_bytes(self._memory[_LENGTH], "little")
        ids = self._memory[_START : _START + size].decode(errors="replace")
        if kind == _ONE:
            return Work(alone=ids)
        if kind == _STEP:
            return Work(prompts=tuple(ids.split("\n")) if ids else ())
        return Work()

    def _note(self, kind: int, ids: str) -> None:
        encoded = ids.encode()
        memory, end = self._memory, _START + len(encoded)
        memory[0] = _UNKNOWN  # while the rest is being written
        if end <= _SIZE:
            memory[_START:end] = encoded
            memory[_LENGTH] = len(encoded).to_bytes(4, "little")
            memory[0] = kind
