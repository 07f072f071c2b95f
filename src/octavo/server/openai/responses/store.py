"""ResponseStore: stored responses by id, in the server's database."""

import sqlite3
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from octavo.server.database import Database
from octavo.server.errors import ApiError

from .items import Item

MAX_AGE = 30 * 24 * 3600  # seconds since the last use, on disk
MAX_ON_DISK = (1_000_000, 8 * 2**30)  # responses and bytes
MAX_IN_MEMORY = (1_000, 64 * 2**20)
MAX_TURNS = 2048  # responses that continue one another
ADDED_SIZE = 512  # bytes that a response takes besides its content
RUNNING = ("queued", "in_progress")
EXPIRY_SECONDS = 60.0  # between two deletions of old responses

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, previous TEXT, status TEXT NOT NULL, used REAL NOT NULL,
    size INTEGER NOT NULL, input BLOB NOT NULL, response BLOB NOT NULL, events BLOB
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS responses_by_use ON responses (used);
CREATE INDEX IF NOT EXISTS responses_by_tenant ON responses (tenant, used);
"""


@dataclass
class StoredResponse:
    """A response and what is needed to continue it.

    Attributes:
        previous: the id of the response that it continues.
        input: the items of its own input.
        response: the response object as it is returned.
        events: the events of its stream, compressed with zlib, if they can be streamed again.
    """

    id: str
    tenant: str
    previous: str | None
    status: str
    input: list[Item]
    response: dict[str, Any]
    events: bytes | None = None

    @property
    def items(self) -> list[Item]:
        """Return the items of its input and output."""
        output: list[Item] = self.response["output"]
        return self.input + output


@dataclass
class _Held:
    """What one tenant has stored."""

    count: int = 0
    size: int = 0


@dataclass
class ResponseStore:
    """Stores responses up to a number, a size and an age. Each tenant sees its own only.

    If there are too many, the least recently used ones of the tenant that has stored the most bytes are deleted.

    Args:
        limits: the maximum number of responses and of bytes.
    """

    database: Database
    limits: tuple[int, int] = (0, 0)
    _held: dict[str, _Held] = field(default_factory=dict)
    _expired: float = 0.0

    def __post_init__(self) -> None:
        if self.limits == (0, 0):
            self.limits = MAX_ON_DISK if self.database.is_on_disk else MAX_IN_MEMORY
        self.database.run_now(self._open)

    async def put(self, stored: StoredResponse) -> None:
        """Store a response, or replace the one with its id."""
        await self.database.run(lambda database: self._put(database, stored))

    async def find(self, id: str, tenant: str) -> StoredResponse | None:
        """Return a tenant's response, or None if there is none of this id."""
        return await self.database.run(lambda database: _find(database, id, tenant))

    async def conversation(self, id: str, tenant: str) -> list[StoredResponse]:
        """Return a response and all that it continues, the first one first. Counts as a use of each.

        Raises ApiError 404 if one of them does not exist, 400 if there are too many.
        """
        return await self.database.run(lambda database: self._conversation(database, id, tenant))

    async def delete(self, id: str, tenant: str) -> bool:
        """Delete a tenant's response. Return whether it existed."""
        return await self.database.run(lambda database: self._delete(database, id, tenant))

    def _open(self, database: sqlite3.Connection) -> None:
        database.executescript(_SCHEMA)
        _fail_interrupted(database)
        counts = "SELECT tenant, count(*), sum(size) FROM responses GROUP BY tenant"
        self._held = {tenant: _Held(count, size) for tenant, count, size in database.execute(counts)}

    def _put(self, database: sqlite3.Connection, stored: StoredResponse) -> None:
        now = time.time()
        if now - self._expired > EXPIRY_SECONDS:
            self._expired = now
            old = database.execute("SELECT id, tenant FROM responses WHERE used < ? LIMIT 10000", (now - MAX_AGE,))
            for id, tenant in old.fetchall():
                self._delete(database, id, tenant)
        self._delete(database, stored.id, stored.tenant)
        given, response = msgspec.json.encode(stored.input), msgspec.json.encode(stored.response)
        size = len(given) + len(response) + len(stored.events or b"") + ADDED_SIZE
        row = (stored.id, stored.tenant, stored.previous, stored.status, now, size, given, response, stored.events)
        database.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        held = self._held.setdefault(stored.tenant, _Held())
        held.count += 1
        held.size += size
        self._evict(database)

    def _evict(self, database: sqlite3.Connection) -> None:
        count, size = (sum(getattr(held, name) for held in self._held.values()) for name in ("count", "size"))
        while count > self.limits[0] or size > self.limits[1]:
            tenant, held = max(self._held.items(), key=lambda item: item[1].size)
            count, size = count - held.count, size - held.size
            oldest = "SELECT id FROM responses WHERE tenant = ? ORDER BY used LIMIT 1"
            [id] = database.execute(oldest, (tenant,)).fetchone()
            self._delete(database, id, tenant)
            held = self._held.get(tenant, _Held())
            count, size = count + held.count, size + held.size

    def _delete(self, database: sqlite3.Connection, id: str, tenant: str) -> bool:
        deletion = "DELETE FROM responses WHERE id = ? AND tenant = ? RETURNING size"
        deleted = database.execute(deletion, (id, tenant)).fetchall()
        for [size] in deleted:
            held = self._held[tenant]
            held.count -= 1
            held.size -= size
            if not held.count:
                del self._held[tenant]
        return bool(deleted)

    def _conversation(self, database: sqlite3.Connection, id: str, tenant: str) -> list[StoredResponse]:
        turns: list[StoredResponse] = []
        following: str | None = id
        while following is not None:
            if len(turns) == MAX_TURNS:
                raise ApiError(400, f"the conversation has more than {MAX_TURNS} responses", "previous_response_id")
            if (stored := _find(database, following, tenant)) is None:
                detail = f", which {turns[-1].id} continues," if turns else ""
                message = f"the response {following[:100]!r}{detail} does not exist, or was deleted"
                raise ApiError(404, message, "previous_response_id", "previous_response_not_found")
            turns.append(stored)
            following = stored.previous
        database.executemany("UPDATE responses SET used = ? WHERE id = ?", [(time.time(), turn.id) for turn in turns])
        return turns[::-1]


def _find(database: sqlite3.Connection, id: str, tenant: str) -> StoredResponse | None:
    columns = "id, tenant, previous, status, input, response, events"
    row = database.execute(f"SELECT {columns} FROM responses WHERE id = ? AND tenant = ?", (id, tenant)).fetchone()
    if row is None:
        return None
    id, tenant, previous, status, given, response, events = row
    decode = msgspec.json.decode
    return StoredResponse(id, tenant, previous, status, decode(given), decode(response), events)


def _fail_interrupted(database: sqlite3.Connection) -> None:
    """Set the status of responses that were being generated when the server ended to failed."""
    running = "SELECT id, response FROM responses WHERE status IN (?, ?)"
    for id, content in database.execute(running, RUNNING).fetchall():
        response = msgspec.json.decode(content)
        response["status"] = "failed"
        response["error"] = {"code": "server_error", "message": "the server stopped before the response was complete"}
        change = "UPDATE responses SET status = 'failed', response = ? WHERE id = ?"
        database.execute(change, (msgspec.json.encode(response), id))
