"""Pages on disk: they outlive the process, and memory is filled from them after a restart.

One file per page, FOLDER/ab/abcdef….page, named by its key. The folder is the index: at start it is listed, and from
then on the tier knows what it has without looking. Several servers may use one folder. Each then knows its own pages
and those that were there when it started; that another one deletes some of them is like any other loss.
"""

import logging
import os
import re
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
_STALE = 60.0  # seconds; a younger temporary file may be one that another server is writing

_log = logging.getLogger("octavo")


class DiskTier:
    """A Tier of files in `folder`, at most `capacity_bytes` of them together.

    A failure to write (a full disk, a removed folder) is logged once, and tried again after `retry_seconds`.
    Raises ConfigError if the folder cannot be made or written, or has no room for a page.
    """

    name = "disk"

    def __init__(self, folder: Path, capacity_bytes: int, page_bytes: int, retry_seconds: float = 10.0):
        self._folder, self._capacity, self._page_bytes = folder.expanduser(), capacity_bytes, page_bytes
        self._file_bytes = page_file_bytes(page_bytes)
        if capacity_bytes < self._file_bytes:
            raise ConfigError(f"kv_disk_size must be at least {self._file_bytes} bytes, the size of one page")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
            self._files = _scan(self._folder)
        except OSError as error:
            raise ConfigError(
                f"kv_disk: cannot write in {self._folder} ({error.strerror}); give a folder that may be written to"
            ) from None
        self._used = sum(self._files.values())
        self._lock = Lock()
        self._retry_seconds = retry_seconds
        self._failing, self._retry_at = False, 0.0
        self._make_room(0)

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
        self._forget(key)
        self._delete(key)
        return None

    def write(self, key: bytes, content: np.ndarray) -> bool:
        if self.touch(key):
            return True
        if self._failing and time.monotonic() < self._retry_at:
            return False
        self._make_room(self._file_bytes)
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
        """The file's time tells the next process, too."""
        with self._lock:
            if key not in self._files:
                return False
            self._files.move_to_end(key)
        now = time.time_ns()
        try:
            os.utime(self._path(key), ns=(now, now))  # the system's own idea of now may be 4 ms old, many pages ago
        except FileNotFoundError:
            self._forget(key)
            return False
        except OSError:  # another user's, or on a disk that can only be read
            pass
        return True

    def close(self) -> None:
        pass

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._folder / name[:2] / f"{name}.page"

    def _make_room(self, size: int) -> None:
        """Count `size` bytes as used, and delete what was used least recently until all fits."""
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
        with suppress(OSError):  # deleted by another server, or not ours to delete
            self._path(key).unlink()

    def _failed(self, error: OSError) -> None:
        with self._lock:
            self._used -= self._file_bytes
            known, self._failing = self._failing, True
            self._retry_at = time.monotonic() + self._retry_seconds
        if not known:
            hint = "new pages are kept in memory only, until it works again"
            _log.warning("kv_disk: cannot write in %s (%s); %s", self._folder, error.strerror, hint)


def _scan(folder: Path) -> OrderedDict[bytes, int]:
    """Sizes of the pages in `folder`, least recently used first. Removes what a killed process did not complete."""
    found = []
    for part in os.scandir(folder):
        if not re.fullmatch("[0-9a-f]{2}", part.name) or not part.is_dir(follow_symlinks=False):
            continue
        for file in os.scandir(part.path):
            name = _NAME.fullmatch(file.name)
            if not name or not file.is_file(follow_symlinks=False):
                continue
            try:
                status = file.stat(follow_symlinks=False)
                if name[2] is None:
                    found.append((status.st_mtime_ns, bytes.fromhex(name[1]), status.st_size))
                elif time.time() - status.st_mtime > _STALE:
                    Path(file.path).unlink()
            except FileNotFoundError:  # by another server
                continue
    return OrderedDict((key, size) for _, key, size in sorted(found))
