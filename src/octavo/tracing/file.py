"""TraceFile: append events to a trace file, in a thread, so that no step and no request waits for a disk."""

import os
import secrets
import stat
import time
from datetime import UTC, datetime
from queue import SimpleQueue
from threading import Thread

import msgspec

from octavo.errors import ConfigError
from octavo.version import __version__

from .events import instant
from .records import count, lines_of

MAX_QUEUED = 16 * 2**20  # bytes; events beyond them are dropped and counted
BATCH_SECONDS = 0.05  # pause after a write: waking the thread for every step takes longer than writing the events
CLOSE_SECONDS = 2.0
_PROCESS = secrets.token_hex(8)  # identifies this process in the first line of its trace files


class TraceFile:
    """A trace file, to which several objects of this process may append. Raises ConfigError if it cannot be written.

    A file that this process has begun is continued; any other file is replaced. The file is a JSON array of one event
    per line, without the closing bracket, which the format permits: so it is complete after every write.
    """

    def __init__(self, path: str):
        self._descriptor = _open(path)
        self._queue: SimpleQueue[tuple[bytes, bool] | None] = SimpleQueue()  # lines, or records if True
        self._queued = self._written = 0  # bytes so far, each changed by one thread
        self._dropped = 0
        self._rest = b""  # of a line that could be written only in part
        self._thread = Thread(target=self._run, name="octavo-trace", daemon=True)
        self._thread.start()

    def write(self, lines: bytes) -> None:
        """Queue lines of events. Drop them if the queue is full. Never blocks. To be called by one thread."""
        if self._queued - self._written > MAX_QUEUED:
            self._dropped += lines.count(b"\n")
            return
        self._queued += len(lines)
        self._queue.put((lines, False))

    def write_records(self, records: bytes) -> None:
        """Queue the events of an engine, from EngineTrace.take, like `write`."""
        if not records:
            return
        if self._queued - self._written > MAX_QUEUED:
            self._dropped += count(records)
            return
        self._queued += len(records)
        self._queue.put((records, True))

    def close(self) -> None:
        """Write what is queued, for at most CLOSE_SECONDS."""
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            is_open = None not in batch
            items = [item for item in batch if item is not None]
            self._append(b"".join(lines_of(data) if is_record else data for data, is_record in items))
            self._written += sum(len(data) for data, _ in items)
            if is_open:
                time.sleep(BATCH_SECONDS)
        os.close(self._descriptor)

    def _append(self, lines: bytes) -> None:
        """Append whole lines. If the disk is full, drop those that do not fit."""
        dropped, self._dropped = self._dropped, 0
        if dropped:
            lines += instant("events dropped", time.monotonic(), os.getpid(), {"events": dropped})
        data, is_begun = self._rest + lines, bool(self._rest)
        try:
            while data:
                written = os.write(self._descriptor, data)
                is_begun = data[written - 1 : written] != b"\n"
                data = data[written:]
        except OSError:
            pass
        end = data.find(b"\n") + 1 if is_begun else 0
        self._rest = data[:end]
        self._dropped += data[end:].count(b"\n")


def _open(path: str) -> int:
    """Return the descriptor of a trace file that has its first line. Raises ConfigError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ConfigError(f"cannot write the trace file {path}: it is not a regular file")
        if _PROCESS.encode() not in os.pread(descriptor, 512, 0).partition(b"\n")[0]:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _first_line())
        return descriptor
    except OSError as error:
        raise ConfigError(f"cannot write the trace file {path}: {error.strerror}") from None


def _first_line() -> bytes:
    """Return the line that begins a file: what wrote it, and the wall-clock time that belongs to a time of events."""
    args = {
        "process": _PROCESS,
        "version": __version__,
        "wall_clock": datetime.now(UTC).isoformat(),
        "monotonic": time.monotonic(),
    }
    return b"[" + msgspec.json.encode({"name": "octavo", "ph": "M", "pid": os.getpid(), "args": args}) + b"\n"
