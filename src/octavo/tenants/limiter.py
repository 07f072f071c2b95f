"""Limiter: decides whether a key's limits allow a request and its tokens, and keeps count."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol

from .key import Key

MINUTE = 60.0  # seconds in which a rate holds

Limit = Literal["requests", "concurrent", "tokens", "month", "waiting"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether something is allowed.

    Attributes:
        refused_by: the limit that forbids it now; None if it is allowed, and then counted.
        wait: seconds after which it may be allowed; infinity if it never is.
        remaining, reset: of the rate that was asked about, what is left, and the seconds until all of it is available.
            -1 if there is no such rate.
    """

    refused_by: Limit | None = None
    wait: float = 0.0
    remaining: int = -1
    reset: float = 0.0

    @property
    def is_final(self) -> bool:
        """Return whether the request is refused even if it waits: no rate makes it wait longer than a minute."""
        return self.wait > MINUTE


@dataclass(slots=True, eq=False)
class Spending:
    """The tokens of a request while it runs.

    Attributes:
        id: unique among the spendings and requests of this process.
        prompt: tokens of its prompts.
        reserved: tokens that it takes at most: those of its prompts, and what it may generate.
        so_far: returns the tokens that it has taken.
        month: the month that they count in.
    """

    id: int
    prompt: int
    reserved: int
    so_far: Callable[[], int]
    month: str = ""


class Limiter(Protocol):
    """Counts what is done with keys. Requests have ids that are unique in this process."""

    async def enter(self, key: Key, id: int) -> Verdict:
        """Count the beginning of a request, if the key's limits of requests allow it."""
        ...

    def leave(self, key: Key, id: int) -> None:
        """Count the end of a request that has entered."""
        ...

    async def reserve(self, key: Key, spending: Spending) -> Verdict:
        """Reserve the tokens of a request, if the key's limits of tokens allow it."""
        ...

    def settle(self, key: Key, spending: Spending) -> None:
        """Replace a reservation by what was really taken."""
        ...

    async def used_this_month(self, key: Key) -> int:
        """Return the tokens that were taken this month."""
        ...

    async def close(self) -> None:
        """Store what must survive."""
        ...


def month_of(now: float) -> str:
    """Return the calendar month in UTC, such as 2026-11, of a Unix time in seconds."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m")


def seconds_to_next_month(now: float) -> float:
    """Return the seconds from a Unix time until the next calendar month in UTC begins."""
    date = datetime.fromtimestamp(now, UTC)
    following = datetime(date.year + date.month // 12, date.month % 12 + 1, 1, tzinfo=UTC)
    return following.timestamp() - now
