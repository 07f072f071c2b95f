"""UsageJournal: writes what is used of keys' limits to SQLite, soon after it happens, and reads it after a restart."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from .limiter import MINUTE
from .local_limiter import Account, LocalLimiter, WindowRow

WRITE_SECONDS = 0.1  # between two transactions; a server that is killed loses what happened since the last one
_TABLES = """
CREATE TABLE IF NOT EXISTS key_events (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL, time REAL NOT NULL, amount INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS key_events_by_time ON key_events (time);
CREATE TABLE IF NOT EXISTS key_months (
    name TEXT NOT NULL, month TEXT NOT NULL, used INTEGER NOT NULL, PRIMARY KEY (name, month));
"""

Result = TypeVar("Result")

log = logging.getLogger("octavo.server")


class Database(Protocol):
    """Runs work with an SQLite connection, in a transaction and in a thread of its own."""

    async def run(self, work: Callable[[sqlite3.Connection], Result]) -> Result: ...

    def run_now(self, work: Callable[[sqlite3.Connection], Result]) -> Result: ...


class UsageJournal:
    """The journal of a LocalLimiter. Nothing waits for its writes, except `close`.

    Args:
        database: where it writes.
        limiter: gets what was stored before.
        clock, wall: those of the limiter.
    """

    def __init__(
        self,
        database: Database,
        limiter: LocalLimiter,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        self._database, self._wall = database, wall
        self._ahead = wall() - clock()  # of Unix time before the limiter's clock
        self._rows: dict[int, WindowRow] = {}  # to be written
        self._touched: dict[str, Account] = {}  # whose month is to be written
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        self._failed = False
        events, months, self._first_id = database.run_now(lambda connection: _read(connection, wall() - MINUTE))
        limiter.restore(events, months)
        limiter.journal = self

    def put(self, id: int, name: str, kind: str, time: float, amount: int) -> None:
        self._rows[id] = WindowRow(self._first_id + id, name, kind, time + self._ahead, amount)
        self._write_soon()

    def touch(self, account: Account) -> None:
        self._touched[account.name] = account
        self._write_soon()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._writing is not None:
            await self._writing
        await self._write()
        if self._timer is not None:
            self._timer.cancel()

    def _write_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WRITE_SECONDS, self._begin_writing)

    def _begin_writing(self) -> None:
        self._writing = asyncio.ensure_future(self._write())

    async def _write(self) -> None:
        rows, self._rows = list(self._rows.values()), {}
        touched, self._touched = self._touched, {}
        months = [(each.name, each.month, each.taken) for each in touched.values()]
        oldest = self._wall() - MINUTE
        try:
            await self._database.run(lambda connection: _write(connection, rows, months, oldest))
            self._failed = False
        except sqlite3.Error as error:
            if not self._failed:
                log.error("what is used of the keys' limits cannot be stored: %s; it is tried again", error)
            self._failed = True
            self._rows = {row.id - self._first_id: row for row in rows if row.time > oldest} | self._rows
            self._touched = touched | self._touched
        self._timer = None
        self._touched |= {each.name: each for each in touched.values() if each.open}  # they go on taking tokens
        if self._rows or self._touched:
            self._write_soon()


def _read(connection: sqlite3.Connection, since: float) -> tuple[list[WindowRow], list[tuple[str, str, int]], int]:
    """Return the events after a Unix time in order, the tokens used in each month, and a free id for an event."""
    for statement in filter(str.strip, _TABLES.split(";")):
        connection.execute(statement)
    events = connection.execute(
        "SELECT id, name, kind, time, amount FROM key_events WHERE time > ? ORDER BY time", (since,)
    )
    rows = [WindowRow(*row) for row in events.fetchall()]
    months: Any = connection.execute("SELECT name, month, used FROM key_months").fetchall()
    last = connection.execute("SELECT max(id) FROM key_events").fetchone()[0] or 0
    return rows, months, last + 1


def _write(
    connection: sqlite3.Connection, rows: list[WindowRow], months: list[tuple[str, str, int]], oldest: float
) -> None:
    connection.executemany(
        "INSERT OR REPLACE INTO key_events VALUES (?, ?, ?, ?, ?)",
        [(row.id, row.name, row.kind, row.time, row.amount) for row in rows if row.time > oldest],
    )
    connection.execute("DELETE FROM key_events WHERE time <= ?", (oldest,))
    connection.executemany("INSERT OR REPLACE INTO key_months VALUES (?, ?, ?)", months)
