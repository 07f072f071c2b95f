"""Database: what a server stores, in one SQLite database on disk or in memory."""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from octavo.errors import ConfigError

DATABASE = "octavo.db"  # in the data folder

Result = TypeVar("Result")


class Database:
    """An SQLite database that one process uses at a time, and one thread of it.

    After a power failure, the last transactions may be missing, but the others are intact.

    Args:
        path: the database's file; None keeps it in memory.

    Raises ConfigError if the file cannot be opened, or another process has opened it.
    """

    def __init__(self, path: Path | None):
        self.is_on_disk = path is not None
        try:
            if path:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path or ":memory:", timeout=1.0, check_same_thread=False)
            # A second server would run the same batches, and fail this one's running responses.
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
        except (OSError, sqlite3.Error) as error:
            hint = " (is another server using it?)" if "locked" in str(error) else ""
            raise ConfigError(f"data_dir cannot be used: {path}: {error}{hint}") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="octavo-database")

    async def run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `work` in a transaction, in the database's thread, and return its result.

        That must not be a cursor: if one were deleted in another thread, it would reset a statement that is in use.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    def run_now(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Do what `run` does, and wait for the result. For the start of a server."""
        return self._thread.submit(self._transact, work).result()

    def close(self) -> None:
        """Wait for running transactions, then close the database."""
        self._thread.submit(self._connection.close)
        self._thread.shutdown()

    def _transact(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        with self._connection:
            return work(self._connection)
