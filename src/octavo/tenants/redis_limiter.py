"""RedisLimiter: the limits of keys, counted in Redis for several frontends together."""

import asyncio
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from octavo.errors import ConfigError

from .key import Key
from .limiter import Spending, Verdict, month_of, seconds_to_next_month
from .local_limiter import LocalLimiter
from .redis_scripts import ENTER, FINAL, LIMITS, RENEW, RESERVE, SETTLE, WITHDRAW

PATIENCE = 1.0  # seconds that Redis may take to answer before it counts as lost
LOOK_SECONDS = 1.0  # between two looks whether it is there again
LEASE_SECONDS = 60.0  # after which what a frontend that has ended had reserved is given back
RENEW_SECONDS = 20.0
MAX_CONNECTIONS = 32
MICROSECONDS = 1_000_000

log = logging.getLogger("octavo.server")


class RedisLimiter:
    """Counts in Redis. While Redis is lost, each frontend counts for itself, from zero.

    Keys without limits are counted here; their tokens of the month are added in Redis every second.

    Args:
        url: such as redis://host:6379/0.
        clock: Unix time in seconds; by default, that of Redis.

    Raises:
        ConfigError: The URL is not valid.
    """

    def __init__(self, url: str, clock: Callable[[], float] | None = None, wall: Callable[[], float] = time.time):
        try:
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=PATIENCE,
                socket_timeout=PATIENCE,
                socket_connect_timeout=PATIENCE,
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError as error:
            raise ConfigError(f"rate_limit_store must be a URL such as redis://host:6379/0: {error}") from None
        self._redis = redis.asyncio.Redis.from_pool(pool)
        place = pool.connection_kwargs
        self._address = place.get("path") or f"{place.get('host', 'localhost')}:{place.get('port', 6379)}"
        self._enter, self._withdraw, self._reserve, self._settle, self._renew = map(
            self._redis.register_script, (ENTER, WITHDRAW, RESERVE, SETTLE, RENEW)
        )
        self._clock, self._wall = clock, wall
        self._local = LocalLimiter(wall=wall)
        self._frontend = uuid.uuid4().hex[:16]
        self._leases: dict[int, str] = {}  # the keys' names of requests that Redis knows, by id
        self._here = clock or time.monotonic
        self._refusals: dict[str, tuple[Key, float, float]] = {}  # by key: until when, and when all is available
        self._is_lost = False
        self._watch: asyncio.Task[None] | None = None
        self._sent: set[asyncio.Task[Any]] = set()

    async def enter(self, key: Key, id: int) -> Verdict:
        if verdict := self._known_refusal(key):
            return verdict
        if key.requests_per_minute is not None or key.concurrent_requests is not None:
            limits = key.requests_per_minute or 0, key.concurrent_requests or 0
            arguments: list[str | int] = [self._now(), self._id(id), *limits, _microseconds(LEASE_SECONDS)]
            keys = _keys(key.name, "requests", "running")
            if reply := await self._decide(
                lambda: self._enter(keys=keys, args=arguments),
                undo=lambda: self._withdraw(keys=keys, args=[self._id(id)]),
            ):
                verdict = self._verdict(reply)
                if verdict.refused_by is None:
                    self._leases[id] = key.name
                elif verdict.refused_by == "requests":
                    self._refusals[key.name] = key, self._here() + verdict.wait, self._here() + verdict.reset
                return verdict
        return await self._local.enter(key, id)

    def leave(self, key: Key, id: int) -> None:
        if self._leases.pop(id, None) is None:
            self._local.leave(key, id)
            return
        [running] = _keys(key.name, "running")
        self._send(lambda: self._redis.zrem(running, self._id(id)))

    async def reserve(self, key: Key, spending: Spending) -> Verdict:
        if key.limits_tokens:
            month = month_of(self._wall())
            amounts = spending.reserved, spending.prompt, key.tokens_per_minute or 0, key.monthly_tokens or 0
            lease = _microseconds(LEASE_SECONDS)
            arguments: list[str | int] = [self._now(), self._id(spending.id), *amounts, month, lease]
            keys = _token_keys(key.name)
            nothing: list[str | int] = [self._now(), self._id(spending.id), 0]
            if reply := await self._decide(
                lambda: self._reserve(keys=keys, args=arguments), undo=lambda: self._settle(keys=keys, args=nothing)
            ):
                verdict = self._verdict(reply)
                if verdict.refused_by is None:
                    spending.month = month
                    self._leases[spending.id] = key.name
                return verdict
        return await self._local.reserve(key, spending)

    def settle(self, key: Key, spending: Spending) -> None:
        if self._leases.pop(spending.id, None) is None:
            self._local.settle(key, spending)
            return
        used = min(spending.so_far(), spending.reserved)
        arguments: list[str | int] = [self._now(), self._id(spending.id), used]
        self._send(lambda: self._settle(keys=_token_keys(key.name), args=arguments))

    async def used_this_month(self, key: Key) -> int:
        month, [months] = month_of(self._wall()), _keys(key.name, "months")
        shared = await self._ask(lambda: self._redis.hget(months, month))
        return int(shared or 0) + await self._local.used_this_month(key)

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self._sent:
            await asyncio.wait(set(self._sent), timeout=PATIENCE)
        await self._push_months()
        await self._redis.aclose()

    def _known_refusal(self, key: Key) -> Verdict | None:
        """Return the refusal that Redis would give, if it is known: requests leave a window only by time.

        So a flood beyond a key's rate costs Redis nothing.
        """
        known, now = self._refusals.get(key.name), self._here()
        if known is None or known[0] is not key or now >= known[1]:
            return None
        return Verdict("requests", known[1] - now, 0, known[2] - now)

    def _now(self) -> str:
        return "" if self._clock is None else str(_microseconds(self._clock()))

    def _id(self, id: int) -> str:
        return f"{self._frontend}:{id}"

    def _verdict(self, reply: list[int]) -> Verdict:
        number, wait, remaining, reset = reply
        if number == FINAL:
            return Verdict("month", seconds_to_next_month(self._wall()))
        return Verdict(LIMITS[number], inf if wait < 0 else wait / MICROSECONDS, remaining, reset / MICROSECONDS)

    async def _ask(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """Return the reply to a command; None while Redis is lost."""
        if self._watch is None:
            self._watch = asyncio.ensure_future(self._look())
        if self._is_lost:
            return None
        try:
            return await command()
        except (RedisError, OSError, TimeoutError) as error:
            self._lose(error)
            return None

    async def _decide(self, command: Callable[[], Awaitable[Any]], undo: Callable[[], Awaitable[Any]]) -> Any:
        """Return the reply to a command. If the caller is cancelled meanwhile, undo what Redis may have counted."""
        asked = asyncio.ensure_future(self._ask(command))
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            asked.add_done_callback(lambda _: self._send(undo))
            raise

    def _send(self, command: Callable[[], Awaitable[Any]]) -> None:
        """Run a command whose reply nobody waits for. If Redis is lost, its lease ends what it would have ended."""
        task = asyncio.ensure_future(self._ask(command))
        self._sent.add(task)
        task.add_done_callback(self._sent.discard)

    def _lose(self, error: Exception) -> None:
        if not self._is_lost:
            reason = " ".join(str(error).split()) or type(error).__name__
            log.error("the limits of keys are counted by this server alone: Redis at %s: %s", self._address, reason)
        self._is_lost = True
        self._refusals.clear()

    async def _look(self) -> None:
        """Keep the leases, add what was counted here, and find out when Redis is there again."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                if self._is_lost:
                    await self._redis.ping()
                    self._is_lost = False
                    log.info("the limits of keys are counted by all servers together again, in Redis")
                await self._push_months()
                if time.monotonic() - renewed >= RENEW_SECONDS:
                    renewed = time.monotonic()
                    await self._renew_leases()
            except (RedisError, OSError, TimeoutError) as error:
                self._lose(error)

    async def _push_months(self) -> None:
        """Add the tokens that were counted here to those in Redis."""
        for account in list(self._local.accounts.values()):  # others may come while Redis is asked
            if account.used:
                [months] = _keys(account.name, "months")
                month, used, account.used = account.month, account.used, 0
                command = partial(self._redis.hincrby, months, month, used)
                if await self._ask(command) is None and account.month == month:
                    account.used += used

    async def _renew_leases(self) -> None:
        ids: defaultdict[str, list[str]] = defaultdict(list)
        for id, name in self._leases.items():
            ids[name].append(self._id(id))
        for name, some in ids.items():
            arguments: list[str | int] = [self._now(), _microseconds(LEASE_SECONDS), *some]
            await self._renew(keys=_keys(name, "running", "open"), args=arguments)


def _microseconds(seconds: float) -> int:
    return round(seconds * MICROSECONDS)


def _keys(name: str, *parts: str) -> list[str]:
    """Return names of Redis keys that are on one node of a cluster."""
    return [f"octavo:{{{name}}}:{part}" for part in parts]


def _token_keys(name: str) -> list[str]:
    return _keys(name, "events", "amounts", "open", "held", "months")
