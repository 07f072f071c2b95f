"""DiskTier: pages on disk, which outlive the process and fill the pool again after a restart.

Each page is a separate file, FOLDER/ab/abcdef….page, named by its key. The folder is listed at start, so there is no
other index. Several servers of one user may share a folder. Each server knows the pages that it wrote and those that
were there when it started. If another server deletes a page, it counts as lost.
"""

import logging
import os
import re
import stat
import tempfile
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np

from octavo.errors import ConfigError
from octavo.formats.page_file import TEMPORARY, BadPageFile, PageFile, page_file_bytes, write_page_file

_NAME = re.compile(rf"([0-9a-f]{{32}})\.page({TEMPORARY})?")
_STALE = 60.0  # age in seconds of abandoned temporary files; another server may still be writing a younger one

_log = logging.getLogger("octavo")


class DiskTier:
    """A Tier of files.

    Forged pages could change answers, so a folder that other users can write to is refused. A failure to write (a full
    disk, a removed folder) is logged once.

    Args:
        folder: the folder of the files; created if it does not exist.
        capacity_bytes: maximum size of all files; beyond it, the least recently used ones are deleted.
        page_bytes: size of a page's content.
        retry_seconds: time after a failed write in which nothing is written.

    Raises:
        ConfigError: the folder cannot be created or written to, others can write to it, or a page exceeds the capacity.
    """

    name = "disk"
    refused = 0

    def __init__(self, folder: Path, capacity_bytes: int, page_bytes: int, retry_seconds: float = 10.0):
        self._folder, self._capacity, self._page_bytes = folder.expanduser(), capacity_bytes, page_bytes
        self._file_bytes = page_file_bytes(page_bytes)
        if capacity_bytes < self._file_bytes:
            raise ConfigError(f"kv_disk_size must be at least {self._file_bytes} bytes, the size of one page")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(self._folder)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
            self._files = _scan(self._folder)
        except OSError as error:
            raise ConfigError(
                f"kv_disk: cannot write in {self._folder} ({error.strerror}); give a folder that you can write to"
            ) from None
        self._used = sum(self._files.values())
        self._lock = Lock()
        self._retry_seconds = retry_seconds
        self._failing, self._retry_at = False, 0.0
        self._reserve(0)

    def __contains__(self, key: bytes) -> bool:
        return key in self._files

    def read(self, key: bytes) -> np.ndarray | None:
        if not self.touch(key):
            return None
        try:
            with PageFile(self._path(key)) as file:
                if file.header.page_bytes == self._page_bytes:
                    return file.read(key)
        except BadPageFile:
            pass
        except OSError:
            self._forget(key)
            return None
        self.discard(key)
        return None

    def discard(self, key: bytes) -> None:
        """Delete a page."""
        self._forget(key)
        self._delete(key)

    def write(self, key: bytes, content: np.ndarray) -> bool:
        if self.touch(key):
            return True
        if self._failing and time.monotonic() < self._retry_at:
            return False
        self._reserve(self._file_bytes)
        try:
            path = self._path(key)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_page_file(path, self._page_bytes, [(key, content)])
        except OSError as error:
            self._failed(error)
            return False
        with self._lock:
            self._used -= self._files.pop(key, 0)  # two threads may write the same page
            self._files[key] = self._file_bytes
            self._failing = False
        self.touch(key)
        return True

    def touch(self, key: bytes) -> bool:
        """Mark a page as just used. The file's modification time keeps this across restarts."""
        with self._lock:
            if key not in self._files:
                return False
            self._files.move_to_end(key)
        now = time.time_ns()
        try:
            os.utime(
                self._path(key), ns=(now, now)
            )  # the kernel's own timestamps are up to 4 ms old, too coarse to order many pages
        except FileNotFoundError:
            self._forget(key)
            return False
        except OSError:  # the disk is read-only
            pass
        return True

    def close(self) -> None:
        pass

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._folder / name[:2] / f"{name}.page"

    def _reserve(self, size: int) -> None:
        """Count `size` more bytes as used, and delete the least recently used pages until all files fit."""
        with self._lock:
            self._used += size
            deleted = []
            while self._used > self._capacity and self._files:
                key, freed = self._files.popitem(last=False)
                self._used -= freed
                deleted.append(key)
        for key in deleted:
            self._delete(key)

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self._used -= self._files.pop(key, 0)

    def _delete(self, key: bytes) -> None:
        with suppress(OSError):  # deleted by another server, or the disk is read-only
            self._path(key).unlink()

    def _failed(self, error: OSError) -> None:
        with self._lock:
            self._used -= self._file_bytes
            known, self._failing = self._failing, True
            self._retry_at = time.monotonic() + self._retry_seconds
        if not known:
            hint = "new pages are kept only in memory until writing works again"
            _log.warning("kv_disk: cannot write in %s (%s); %s", self._folder, error.strerror, hint)


def _scan(folder: Path) -> OrderedDict[bytes, int]:
    """Return the sizes of the pages in `folder`, least recently used first.

    Deletes files that a killed process did not complete, and ignores files that others can write to. Raises OSError,
    and ConfigError if others can write to a subfolder.
    """
    found = []
    for part in os.scandir(folder):
        if not re.fullmatch("[0-9a-f]{2}", part.name) or not part.is_dir(follow_symlinks=False):
            continue
        _check_private(Path(part.path))
        for file in os.scandir(part.path):
            name = _NAME.fullmatch(file.name)
            if not name or not file.is_file(follow_symlinks=False):
                continue
            try:
                status = file.stat(follow_symlinks=False)
                if name[2] is None:
                    if not _writable_by_others(status):
                        found.append((status.st_mtime_ns, bytes.fromhex(name[1]), status.st_size))
                elif time.time() - status.st_mtime > _STALE:
                    Path(file.path).unlink()
            except FileNotFoundError:  # deleted by another server
                continue
    return OrderedDict((key, size) for _, key, size in sorted(found))


def _check_private(folder: Path) -> None:
    """Raise ConfigError if other users can write to `folder`."""
    if _writable_by_others(folder.stat()):
        raise ConfigError(
            f"kv_disk: other users can write to {folder} and could change answers with forged pages; "
            f"give a folder of your own that only you can write to (chmod go-w)"
        )


def _writable_by_others(status: os.stat_result) -> bool:
    """Return whether a user other than this one and root can write to a file or folder (access lists aside)."""
    return status.st_uid not in (os.geteuid(), 0) or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
