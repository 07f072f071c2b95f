"""AuditLog: write the lines of an audit log in a thread, and refuse requests while they cannot be written."""

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError
from octavo.server.edge.access_log import HEALTH, MAX_REFUSED, PROBES, RequestRecord, fields
from octavo.server.errors import ApiError
from octavo.tenants.window import SlidingWindow

from .chain import ORIGIN, Keys, mac_of, sealed
from .evidence import Evidence

MAX_QUEUED = 10_000  # lines; while more wait for a slow disk, requests are refused
RETRY_SECONDS = 1.0  # between attempts to write while the disk is full or broken
CLOSE_SECONDS = 5.0  # for the last lines
UNAVAILABLE = "audit_log_unavailable"  # the code of the error
_BATCH = 512  # lines that are written at a time

log = logging.getLogger("octavo.server")


class AuditLog:
    """An audit log, which this process alone writes.

    Lines are written, and forced to the disk (fsync), in batches: no response waits for its line, and what is lost when
    the machine fails are the lines of the latest moments. If lines cannot be written, they are kept, and requests are
    refused with status 503 until they are. A file that was renamed is followed by a new one.

    Of the requests without a right key, MAX_REFUSED a second have lines of their own, and the others are counted: a
    flood must not fill the disk.

    Args:
        path: the file; a log that it has is continued.
        key: 64 hexadecimal digits.

    Raises:
        ConfigError: the file cannot be written, or it was not written with this key.
    """

    def __init__(self, path: Path, key: str):
        self._path, self._keys = path.expanduser().absolute(), Keys.of(key)
        self._lines: deque[dict[str, Any]] = deque()
        self._wake = threading.Event()
        self._closing = self._failing = False
        self._refusals = SlidingWindow(MAX_REFUSED, seconds=1.0)
        self._refused = 0  # requests that are counted but not in a line yet
        try:
            self._file = _open(self._path)
        except OSError as error:
            raise self._unusable(error) from None
        try:
            self._last, torn = self._resume()
            self._write([{"event": "start", "time": _now(), **({"torn": torn} if torn else {})}])
        except OSError as error:
            os.close(self._file)
            raise self._unusable(error) from None
        except ConfigError:
            os.close(self._file)
            raise
        self._thread = threading.Thread(target=self._run, name="octavo-audit-log", daemon=True)
        self._thread.start()

    @property
    def accepts(self) -> bool:
        """Return whether a request would get its line."""
        return not self._failing and len(self._lines) < MAX_QUEUED

    def begin(self, record: RequestRecord) -> None:
        """Prepare to hash a request and its answers. Raises ApiError 503 if lines cannot be written."""
        if record.path not in PROBES:
            record.evidence = Evidence(self._keys, partial(self._queue, record))
        if not self.accepts and record.path != HEALTH:
            message = "the audit log cannot be written, so no request is served until it can"
            raise ApiError(503, message, code=UNAVAILABLE, headers={"retry-after": "1"})

    def end(self, record: RequestRecord) -> None:
        """Queue the line of a request that has ended. Never blocks."""
        if record.evidence is not None and not record.evidence.is_deferred and record.error != UNAVAILABLE:
            record.evidence.end()

    def _queue(self, record: RequestRecord) -> None:
        assert record.evidence is not None
        if record.status == 401 and self._refusals.take(time.monotonic()):
            self._refused += 1
            return
        self._count_refused()
        now, seconds = datetime.now(UTC), time.perf_counter() - record.started
        values = {"event": "request", **fields(now, seconds, record), **record.evidence.fields()}
        self._lines.append({name: value for name, value in values.items() if value is not None})
        self._wake.set()

    def _count_refused(self) -> None:
        """Queue a line for the refused requests that got none of their own."""
        if self._refused:
            self._lines.append({"event": "refused", "time": _now(), "count": self._refused})
            self._refused = 0

    def close(self) -> None:
        """Write the last lines, for a few seconds at most."""
        self._count_refused()
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            os.close(self._file)
        if self._lines:
            log.error("audit_log: %d lines could not be written to %s", len(self._lines), self._path)

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(f"audit_log: cannot write {self._path} ({error.strerror})")

    def _run(self) -> None:
        while not (self._closing and (self._failing or not self._lines)):
            self._wake.wait()
            self._wake.clear()
            while self._lines and self._attempt(batch := list(islice(self._lines.copy(), _BATCH))):
                for _ in batch:
                    self._lines.popleft()
        if not self._failing:
            self._attempt([{"event": "stop", "time": _now()}])

    def _attempt(self, batch: list[dict[str, Any]]) -> bool:
        """Write some lines. Return False, after a pause, if that fails."""
        try:
            self._follow()
            self._write(batch)
        except OSError as error:
            if not self._failing:
                log.error("audit_log: cannot write %s (%s); requests are refused", self._path, error.strerror)
            self._failing = True
            if not self._closing:
                time.sleep(RETRY_SECONDS)
            self._wake.set()
            return False
        if self._failing:
            log.error("audit_log: %s can be written again", self._path)
        self._failing = False
        return True

    def _follow(self) -> None:
        """Begin a new file if the current one was renamed or deleted. Raises OSError."""
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._file)):  # noqa: PTH116
                return
        except FileNotFoundError:
            pass
        file = _open(self._path)
        os.close(self._file)
        self._file = file

    def _write(self, batch: list[dict[str, Any]]) -> None:
        """Write lines completely or not at all, and wait until they are on the disk. Raises OSError."""
        lines, last = [], self._last
        for values in batch:
            line, last = sealed(values, last, self._keys)
            lines.append(line)
        size = os.fstat(self._file).st_size
        try:
            content = memoryview(b"".join(lines))
            while content:
                content = content[os.write(self._file, content) :]
            os.fsync(self._file)
        except OSError:
            _cut(self._file, size)
            raise
        self._last = last

    def _resume(self) -> tuple[str, int]:
        """Return the mac of the file's last whole line, and the size of a torn line after it, which is ended.

        Raises ConfigError if the file was not written with this key.
        """
        last, torn = _last_lines(self._file)
        if torn and (mac := mac_of(torn + b"\n", self._keys)) is not None:  # only the line break is missing
            os.write(self._file, b"\n")
            return mac, 0
        mac = mac_of(last, self._keys) if last else ORIGIN
        if mac is None:
            raise ConfigError(
                f"audit_log: {self._path} ends with a line that was changed or written with another key: move the file "
                "away (octavo audit verify says what is wrong with it)"
            )
        if torn:
            os.write(self._file, b"\n")
        return mac, len(torn)


def _open(path: Path) -> int:
    """Open a log for this process alone. Raises OSError."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise OSError(errno.EBUSY, "another server writes it") from None
    except OSError:  # the file system has no locks
        pass
    return file


def _last_lines(file: int) -> tuple[bytes, bytes]:
    """Return a file's last line that ends, and what follows it; each may be empty."""
    if os.fstat(file).st_size == 0:  # nothing to map; so it is for a device, too
        return b"", b""
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1
        start = content.rfind(b"\n", 0, max(0, end - 1)) + 1
        return content[start:end], content[end:]


def _cut(file: int, size: int) -> None:
    """Remove what was written of a batch. A device has no size to cut."""
    with contextlib.suppress(OSError):
        os.ftruncate(file, size)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
