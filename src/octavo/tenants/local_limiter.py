"""LocalLimiter: the limits of keys, counted in this process."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from .key import Key
from .limiter import MINUTE, Spending, Verdict, month_of, seconds_to_next_month
from .window import Entry, SlidingWindow

CONCURRENT_WAIT = 1.0  # seconds after which a client that has too many requests at the same time may try again
_month_of_day = lru_cache(8)(lambda day: month_of(day * 86_400.0))


@dataclass(frozen=True, slots=True)
class WindowRow:
    """An event in a window of a key, to be stored. `kind` is "requests" or "tokens", `time` Unix time in seconds."""

    id: int
    name: str
    kind: str
    time: float
    amount: int


@dataclass(slots=True, eq=False)
class Account:
    """What is done with a key now, what was done in the last minute, and this month.

    Attributes:
        running: requests that run.
        used: tokens of this month's requests that have ended.
        open: the requests that run and have reserved tokens, each with its entry in the window.
    """

    name: str
    running: int = 0
    requests: SlidingWindow = field(default_factory=lambda: SlidingWindow(0, MINUTE))
    tokens: SlidingWindow = field(default_factory=lambda: SlidingWindow(0, MINUTE))
    month: str = ""
    used: int = 0
    open: dict[int, tuple[Spending, Entry | None]] = field(default_factory=dict)

    def turn_to(self, month: str) -> None:
        """Count from zero if a new month has begun."""
        if self.month != month:
            self.month, self.used = month, 0

    @property
    def reserved(self) -> int:
        """Return the tokens that running requests have reserved this month."""
        return sum(spending.reserved for spending, _ in self.open.values() if spending.month == self.month)

    @property
    def taken(self) -> int:
        """Return the tokens of this month, those included that running requests have taken so far."""
        running = (spending.so_far() for spending, _ in self.open.values() if spending.month == self.month)
        return self.used + sum(running)


class Journal(Protocol):
    """Stores changes of accounts, soon."""

    def put(self, id: int, name: str, kind: str, time: float, amount: int) -> None:
        """Store an event of a window, in place of the one with the same id. The time is on the limiter's clock."""
        ...

    def touch(self, account: Account) -> None:
        """Store the tokens that an account has used this month."""
        ...

    async def close(self) -> None:
        """Store what is left."""
        ...


class LocalLimiter:
    """Counts in memory, and, with a journal, on disk.

    A request counts in the minute in which it is admitted: with prompt and max_tokens while it runs, then with what it
    has taken.

    Args:
        clock: seconds that do not go back.
        wall: Unix time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time):
        self._clock, self._wall = clock, wall
        self.accounts: dict[str, Account] = {}
        self.journal: Journal | None = None

    def account(self, name: str) -> Account:
        """Return a key's account, in the present month."""
        account = self.accounts.get(name)
        if account is None:
            account = self.accounts[name] = Account(name)
        account.turn_to(_month_of_day(int(self._wall() // 86_400)))
        return account

    async def enter(self, key: Key, id: int) -> Verdict:
        account, limit = self.account(key.name), key.requests_per_minute
        if key.concurrent_requests is not None and account.running >= key.concurrent_requests:
            return Verdict("concurrent", CONCURRENT_WAIT)
        if limit is None:
            account.running += 1
            return Verdict()
        now, window = self._clock(), account.requests
        window.limit = limit
        if wait := window.wait(now):
            return Verdict("requests", wait, window.remaining(now), window.seconds_until_empty(now))
        account.running += 1
        window.add(now)
        if self.journal is not None:
            self.journal.put(id, key.name, "requests", now, 1)
        return Verdict(None, 0.0, window.remaining(now), window.seconds_until_empty(now))

    def leave(self, key: Key, id: int) -> None:
        self.account(key.name).running -= 1

    async def reserve(self, key: Key, spending: Spending) -> Verdict:
        account, amount = self.account(key.name), spending.reserved
        budget, limit = key.monthly_tokens, key.tokens_per_minute
        if budget is not None and account.used + account.reserved + amount > budget:
            never = account.used + amount > budget
            return Verdict("month", seconds_to_next_month(self._wall()) if never else CONCURRENT_WAIT)
        entry, verdict = None, Verdict()
        if limit is not None:
            now, window = self._clock(), account.tokens
            window.limit = limit
            if wait := window.wait(now, amount):
                return Verdict("tokens", wait, window.remaining(now), window.seconds_until_empty(now))
            entry = window.add(now, amount)
            verdict = Verdict(None, 0.0, window.remaining(now), window.seconds_until_empty(now))
            if self.journal is not None:
                self.journal.put(spending.id, key.name, "tokens", now, amount)
        spending.month = account.month
        account.open[spending.id] = spending, entry
        if self.journal is not None:
            self.journal.touch(account)
        return verdict

    def settle(self, key: Key, spending: Spending) -> None:
        account = self.account(key.name)
        _, entry = account.open.pop(spending.id)
        used = min(spending.so_far(), spending.reserved)
        if spending.month == account.month:
            account.used += used
        if entry is not None:
            account.tokens.change(entry, used)
        if self.journal is not None:
            self.journal.touch(account)
            if entry is not None and entry.is_inside:
                self.journal.put(spending.id, key.name, "tokens", entry.time, used)

    async def used_this_month(self, key: Key) -> int:
        return self.account(key.name).taken

    async def close(self) -> None:
        if self.journal is not None:
            await self.journal.close()

    def restore(self, rows: Iterable[WindowRow], months: Iterable[tuple[str, str, int]]) -> None:
        """Count what was stored: events in the order of their times, and (key, month, tokens used)."""
        ahead = self._wall() - self._clock()
        now = self._clock()
        for row in rows:
            account = self.account(row.name)
            window = account.requests if row.kind == "requests" else account.tokens
            window.add(min(row.time - ahead, now), row.amount)  # the clock may have been set back meanwhile
        for name, month, used in months:
            account = self.account(name)
            if account.month == month:
                account.used = used
