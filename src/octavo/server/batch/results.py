"""The file of a batch's results: it grows in the order of the input, and is continued after an interruption."""

import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from octavo.errors import ConfigError

from .lines import Result, Row, read_result

SYNC_SECONDS = 1.0  # between two calls of fsync


class OtherResults(ConfigError):
    """An output file that does not have the results of the input."""


@dataclass
class Counts:
    """Totals of a batch; tokens and seconds without those of an earlier run that is continued."""

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        return self.completed + self.failed

    def add(self, result: Result) -> None:
        self.failed += result.failed
        self.completed += not result.failed
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens


class ResultFile:
    """An output file, open for appending. Only one process can have it open.

    Lines are handed to the operating system as soon as they are complete and in order, so none is lost if the process
    is killed. After a power failure, the lines of the last SYNC_SECONDS may be missing and are computed again.

    Raises ConfigError if the file cannot be opened.
    """

    def __init__(self, path: Path):
        try:
            self._file: BinaryIO = path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None
        self._path = path
        self._synced = time.monotonic()
        self.counts = Counts()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(f"another process is writing {path}") from None

    def resume(self, rows: Iterator[Row]) -> None:
        """Skip the rows whose results are in the file already, and delete a last line that is incomplete.

        Raises OtherResults if a line is not the result of the row at its position.
        """
        end = 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._check(line, next(rows, None))
                end += len(line)
        self._file.truncate(end)

    def _check(self, line: bytes, row: Row | None) -> None:
        number = self.counts.rows + 1
        try:
            custom_id, is_failure = read_result(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise OtherResults(f"{self._path} exists, and its line {number} is not a batch result") from None
        if row is None or row.custom_id != custom_id:
            detail = "the input has ended" if row is None else f"the input has custom_id {row.custom_id!r}"
            raise OtherResults(
                f"{self._path} has the results of another input: where its line {number} has custom_id {custom_id!r}, "
                f"{detail}"
            )
        self.counts.failed += is_failure
        self.counts.completed += not is_failure

    def write(self, results: list[Result], sync: bool = True) -> None:
        """Append results. Raises OSError.

        Args:
            sync: whether to synchronize the file to the disk every SYNC_SECONDS, which blocks.
        """
        content = memoryview(b"".join(result.line for result in results))
        while content:
            content = content[self._file.write(content) :]
        for result in results:
            self.counts.add(result)
        if sync and time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until the file is on the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        self._file.close()
