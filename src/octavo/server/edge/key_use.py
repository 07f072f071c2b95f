"""KeyUse: what one request uses of its key's limits. A request beyond them is refused, or waits in line."""

import asyncio
import contextlib
import itertools
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from math import ceil

from octavo.frontend.tally import Tally
from octavo.server.errors import ApiError
from octavo.tenants.key import Key
from octavo.tenants.limiter import Limiter, Spending, Verdict

from .access_log import RequestRecord
from .traffic import Traffic

MAX_WAITING = 100  # requests of a key in each of its two lines; further ones are refused
LOOK_SECONDS = 1.0  # between two looks of the first in line: another server may have given something back


@dataclass(slots=True, eq=False)
class _Line:
    """Requests of a key that wait for one of its limits, first come, first served."""

    first: asyncio.Lock = field(default_factory=asyncio.Lock)  # its waiters get it in the order in which they came
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0


class KeyLimits:
    """The limits of all keys.

    Args:
        limiter: keeps count.
        waits: whether a request over a rate waits; otherwise it is refused.
        traffic: counts the requests of clients that run; those that wait are not among them.
    """

    def __init__(self, limiter: Limiter, waits: bool = False, traffic: Traffic | None = None):
        self.limiter, self.waits = limiter, waits
        self._traffic = traffic or Traffic()
        self._ids = itertools.count()
        # By the key's name, and what is waited for.
        self._lines: defaultdict[tuple[str, str], _Line] = defaultdict(_Line)

    def new_id(self) -> int:
        """Return an id for a request or a spending."""
        return next(self._ids)

    async def allowed(
        self, key: Key, what: str, ask: Callable[[], Awaitable[Verdict]], timeout: float | None, waits: bool
    ) -> Verdict:
        """Return the verdict of `ask`, after waiting for it in line if the key's rate does not allow it now.

        Args:
            what: names the key's line.
            timeout: limit on the wait, in seconds.
            waits: whether the request may wait.
        """
        if not (waits and self.waits):
            return await ask()
        line = self._lines[key.name, what]
        if line.waiting >= MAX_WAITING:
            return Verdict("waiting", LOOK_SECONDS)
        if not line.waiting:
            verdict = await ask()
            if verdict.refused_by is None or verdict.is_final or (timeout and verdict.wait > timeout):
                return verdict
        else:
            verdict = Verdict("waiting", LOOK_SECONDS)
        line.waiting += 1
        self._traffic.add(-1)
        try:
            async with asyncio.timeout(timeout), line.first:
                while True:
                    line.changed.clear()
                    verdict = await ask()
                    if verdict.refused_by is None or verdict.is_final:
                        return verdict
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(line.changed.wait(), min(verdict.wait, LOOK_SECONDS))
        except TimeoutError:
            return verdict
        finally:
            self._traffic.add(1)
            line.waiting -= 1

    def changed(self, key: Key) -> None:
        """Let the first in each of the key's lines look again: something was given back."""
        for what in ("requests", "tokens"):
            if line := self._lines.get((key.name, what)):
                line.changed.set()


class KeyUse:
    """What a request uses of its key's limits.

    Args:
        may_wait: whether the request is counted when its model is chosen, and may wait then; otherwise, at once.
    """

    def __init__(self, limits: KeyLimits, key: Key, record: RequestRecord, may_wait: bool):
        self.key, self.may_wait = key, may_wait and limits.waits
        self._limits, self._record = limits, record
        self._id = limits.new_id()
        self._has_entered = False

    async def enter(self, timeout: float | None = None) -> None:
        """Count the request, once, if its key's limits of requests allow it. Raises ApiError 429."""
        if self._has_entered:
            return
        key, limiter = self.key, self._limits.limiter
        verdict = await self._limits.allowed(
            key, "requests", lambda: limiter.enter(key, self._id), timeout, self.may_wait
        )
        if key.requests_per_minute is not None:
            self._show("requests", key.requests_per_minute, verdict)
        if verdict.refused_by is not None:
            raise _refusal(key, verdict)
        self._has_entered = True

    def leave(self) -> None:
        """Note the end of the request."""
        if self._has_entered:
            self._limits.limiter.leave(self.key, self._id)
            self._limits.changed(self.key)

    @contextlib.asynccontextmanager
    async def spending(self, prompt: int, generated: int, timeout: float | None) -> AsyncGenerator[Tally]:
        """Reserve tokens for a block, and yield the Tally of what it takes. The rest is given back.

        Args:
            prompt: tokens of the prompts.
            generated: tokens that are generated at most.
            timeout: limit on the wait for the key's rate, in seconds.

        Raises ApiError 429.
        """
        key, limits, tally = self.key, self._limits, Tally()
        spending = Spending(limits.new_id(), prompt, prompt + generated, lambda: tally.total)
        verdict = await limits.allowed(
            key, "tokens", lambda: limits.limiter.reserve(key, spending), timeout, waits=True
        )
        if key.tokens_per_minute is not None and verdict.remaining >= 0:
            self._show("tokens", key.tokens_per_minute, verdict)
        if verdict.refused_by is not None:
            raise _refusal(key, verdict, spending)
        try:
            yield tally
        finally:
            limits.limiter.settle(key, spending)
            limits.changed(key)

    def _show(self, what: str, limit: int, verdict: Verdict) -> None:
        """Show what is left of a rate in the response's header."""
        self._record.response_headers += [
            (f"x-ratelimit-limit-{what}".encode(), b"%d" % limit),
            (f"x-ratelimit-remaining-{what}".encode(), b"%d" % max(0, verdict.remaining)),
            (f"x-ratelimit-reset-{what}".encode(), b"%.3fs" % verdict.reset),
        ]


def _refusal(key: Key, verdict: Verdict, spending: Spending | None = None) -> ApiError:
    """Return the error of a request that is not allowed, in OpenAI's words where it has some."""
    match verdict.refused_by:
        case "requests":
            what = f"the key {key.name} has made {key.requests_per_minute} requests in the last minute, its limit"
        case "concurrent":
            what = f"the key {key.name} has {key.concurrent_requests} requests at the same time, its limit"
        case "waiting":
            what = f"other requests of the key {key.name} wait for its limits already, too many or too long"
        case _:
            assert spending is not None
            return _too_many_tokens(key, verdict, spending)
    return _error(what, verdict, "rate_limit_exceeded", "requests")


def _too_many_tokens(key: Key, verdict: Verdict, spending: Spending) -> ApiError:
    generated = spending.reserved - spending.prompt
    may_take = f"this request may take {spending.reserved} tokens, {spending.prompt} of its prompt"
    may_take += f" and {generated} generated (max_tokens)" if generated else ""
    advice = ": send a lower max_tokens, or a shorter prompt" if verdict.is_final else ""
    if verdict.refused_by == "month":
        budget = f"the {key.monthly_tokens} tokens of this month that the key {key.name} has"
        what = f"too little is left of {budget}: {may_take}{advice}"
        code = "insufficient_quota" if verdict.is_final else "rate_limit_exceeded"
        return _error(what, verdict, code, "insufficient_quota" if verdict.is_final else "tokens")
    limit = f"the {key.tokens_per_minute} tokens per minute of the key {key.name}"
    if verdict.is_final:
        return _error(f"request too large for {limit}: {may_take}{advice}", verdict, "rate_limit_exceeded", "tokens")
    what = f"of {limit}, {verdict.remaining} are left: {may_take}"
    return _error(what, verdict, "rate_limit_exceeded", "tokens")


def _error(message: str, verdict: Verdict, code: str, kind: str) -> ApiError:
    headers = {"x-should-retry": "false"} if verdict.is_final else {}
    if verdict.wait < float("inf"):
        headers |= {"retry-after": str(ceil(verdict.wait)), "retry-after-ms": str(ceil(1000 * verdict.wait))}
    return ApiError(429, message, code=code, headers=headers, kind=kind)
