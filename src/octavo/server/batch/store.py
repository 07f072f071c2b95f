"""FileStore: files and batches in the server's database, with the contents of files beside it."""

from pathlib import Path
from typing import Any

import msgspec

from octavo.errors import ConfigError
from octavo.server.database import Database

MAX_PAGE = 10_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, tenant TEXT NOT NULL,
    content BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS objects_by_tenant ON objects (kind, tenant, number);
"""

Content = dict[str, Any]


class FileStore:
    """Stores the objects of /v1/files and /v1/batches. Each tenant sees its own only.

    Args:
        folder: for the contents of files. Raises ConfigError if it cannot be used.
    """

    def __init__(self, folder: Path, database: Database):
        self.files, self.batches = folder / "files", folder / "batches"
        try:
            for each in (self.files, self.batches):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data_dir cannot be used: {folder}: {error}") from None
        self._database = database
        database.run_now(lambda connection: connection.executescript(_SCHEMA).rowcount)
        self._delete_unrecorded()

    def _delete_unrecorded(self) -> None:
        """Delete files that a server wrote, but did not record before it was killed."""
        query = "SELECT id FROM objects"
        ids = {id for [id] in self._database.run_now(lambda connection: connection.execute(query).fetchall())}
        for path in (*self.files.iterdir(), *self.batches.iterdir()):
            if path.stem not in ids:
                path.unlink()

    async def put(self, tenant: str, *objects: Content) -> None:
        """Store objects, or replace those with their ids, in one transaction."""
        rows = [(each["id"], each["object"], tenant, msgspec.json.encode(each)) for each in objects]
        statement = (
            "INSERT INTO objects (id, kind, tenant, content) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET content = excluded.content"
        )
        await self._database.run(lambda connection: connection.executemany(statement, rows).rowcount)

    async def find(self, kind: str, tenant: str, id: str) -> Content | None:
        """Return a tenant's object, or None if there is none of this id."""
        query = "SELECT content FROM objects WHERE id = ? AND kind = ? AND tenant = ?"
        row = await self._database.run(lambda connection: connection.execute(query, (id, kind, tenant)).fetchone())
        return None if row is None else msgspec.json.decode(row[0])

    async def delete(self, kind: str, tenant: str, id: str) -> bool:
        """Delete a tenant's object. Return whether it existed."""
        statement = "DELETE FROM objects WHERE id = ? AND kind = ? AND tenant = ?"
        values = (id, kind, tenant)
        return await self._database.run(lambda connection: connection.execute(statement, values).rowcount > 0)

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
        rows = await self._database.run(lambda connection: connection.execute(query, values).fetchall())
        return [msgspec.json.decode(content) for [content] in rows[:limit]], len(rows) > limit

    async def file_usage(self, tenant: str) -> tuple[int, int]:
        """Return the number of a tenant's files and their bytes."""
        sizes = "json_extract(CAST(content AS TEXT), '$.bytes')"
        query = f"SELECT count(*), coalesce(sum({sizes}), 0) FROM objects WHERE kind = 'file' AND tenant = ?"
        count, size = await self._database.run(lambda connection: connection.execute(query, (tenant,)).fetchone())
        return count, size

    def all_batches(self) -> list[tuple[str, Content]]:
        """Return the batches of all tenants, with the tenant of each. For the start of a server."""
        query = "SELECT tenant, content FROM objects WHERE kind = 'batch' ORDER BY number"
        rows = self._database.run_now(lambda connection: connection.execute(query).fetchall())
        return [(tenant, msgspec.json.decode(content)) for tenant, content in rows]
