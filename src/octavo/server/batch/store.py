"""FileStore: files and batches in an SQLite database, with the contents of files beside it."""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from octavo.errors import ConfigError

DATABASE = "batches.db"  # in the data folder
MAX_PAGE = 10_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, tenant TEXT NOT NULL,
    content BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS objects_by_tenant ON objects (kind, tenant, number);
"""

Content = dict[str, Any]
Result = TypeVar("Result")


class FileStore:
    """Stores the objects of /v1/files and /v1/batches. Each tenant sees its own only.

    A thread of the store runs the database. Raises ConfigError if it cannot be opened, or another process has it open.
    """

    def __init__(self, folder: Path):
        self.files, self.batches = folder / "files", folder / "batches"
        try:
            for each in (folder, self.files, self.batches):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._database = sqlite3.connect(folder / DATABASE, timeout=1.0, check_same_thread=False)
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")  # two servers would run the same batches
            self._database.execute("PRAGMA journal_mode = WAL")
            with self._database:
                self._database.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            hint = " (is another server using it?)" if "locked" in str(error) else ""
            raise ConfigError(f"data_dir cannot be used: {folder}: {error}{hint}") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="octavo-batches")

    async def put(self, tenant: str, *objects: Content) -> None:
        """Store objects, or replace those with their ids, in one transaction."""
        rows = [(each["id"], each["object"], tenant, msgspec.json.encode(each)) for each in objects]
        statement = (
            "INSERT INTO objects (id, kind, tenant, content) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET content = excluded.content"
        )
        await self._run(lambda database: database.executemany(statement, rows))

    async def find(self, kind: str, tenant: str, id: str) -> Content | None:
        """Return a tenant's object, or None if there is none of this id."""
        query = "SELECT content FROM objects WHERE id = ? AND kind = ? AND tenant = ?"
        row = await self._run(lambda database: database.execute(query, (id, kind, tenant)).fetchone())
        return None if row is None else msgspec.json.decode(row[0])

    async def delete(self, kind: str, tenant: str, id: str) -> bool:
        """Delete a tenant's object. Return whether it existed."""
        statement = "DELETE FROM objects WHERE id = ? AND kind = ? AND tenant = ?"
        return await self._run(lambda database: database.execute(statement, (id, kind, tenant)).rowcount > 0)

    async def page(
        self, kind: str, tenant: str, limit: int, after: str | None, newest_first: bool, purpose: str | None = None
    ) -> tuple[list[Content], bool]:
        """Return a tenant's objects after the one with the id `after`, and whether there are more."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        query = "SELECT content FROM objects WHERE kind = ? AND tenant = ?"
        values: list[Any] = [kind, tenant]
        if after is not None:
            query += f" AND number {sign} (SELECT number FROM objects WHERE id = ? AND tenant = ?)"
            values += [after, tenant]
        if purpose is not None:
            query += " AND json_extract(CAST(content AS TEXT), '$.purpose') = ?"
            values.append(purpose)
        query += f" ORDER BY number {order} LIMIT {limit + 1}"
        rows = await self._run(lambda database: database.execute(query, values).fetchall())
        return [msgspec.json.decode(content) for [content] in rows[:limit]], len(rows) > limit

    def all_batches(self) -> list[tuple[str, Content]]:
        """Return the batches of all tenants, with the tenant of each. Call it before the store is used otherwise."""
        rows = self._database.execute("SELECT tenant, content FROM objects WHERE kind = 'batch' ORDER BY number")
        return [(tenant, msgspec.json.decode(content)) for tenant, content in rows]

    async def _run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    def _transact(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        with self._database:
            return work(self._database)
