"""Limits of API keys in virtual time: exact in this process and in Redis, across restarts, and fair while waiting."""

import asyncio
import heapq
import random
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ConfigError
from octavo.server.database import Database
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.key_use import MAX_WAITING, KeyLimits, KeyUse
from octavo.server.edge.traffic import Traffic
from octavo.server.errors import ApiError, error_headers, error_reply
from octavo.tenants import redis_limiter
from octavo.tenants.key import Key, secret_hash
from octavo.tenants.limiter import Limiter, Spending, seconds_to_next_month
from octavo.tenants.local_limiter import LocalLimiter
from octavo.tenants.redis_limiter import RedisLimiter
from octavo.tenants.usage_journal import UsageJournal
from redis_process import redis_server
from virtual_time import virtual_loop

MONTH_END = datetime(2026, 11, 30, 23, 59, 0, tzinfo=UTC).timestamp()  # a minute before December


def key(name: str, **limits: Any) -> Key:
    return Key(name=name, hash=secret_hash(name), **limits)


class World:
    """Tenants that send requests in virtual time, and a brute-force account of what each one got.

    Times are multiples of 1/8 s, which both floating-point seconds and microseconds keep exactly.
    """

    def __init__(self, seed: int, longest: int = 90) -> None:
        self.longest = longest  # seconds that a request runs
        self.now = MONTH_END - 3600
        self.random = random.Random(seed)
        self.requests: list[float] = []  # times of admission
        self.tokens: list[list[Any]] = []  # time of admission and tokens, at first those reserved
        self.ends: list[tuple[float, int, Callable[[], Awaitable[None]]]] = []
        self.refused = 0

    def recent(self) -> tuple[int, int]:
        """Of the last minute, the number of requests, and the tokens."""
        return (
            sum(at + 60 > self.now for at in self.requests),
            sum(amount for at, amount in self.tokens if at + 60 > self.now),
        )

    def least_wait(self, entries: list[Any], amount: int, limit: int) -> float:
        """Until the first time at which the entries leave room for `amount`, as they are now."""
        ends = sorted(at + 60 for at, _ in entries if at + 60 > self.now)
        return next(end for end in ends if sum(n for at, n in entries if at + 60 > end) + amount <= limit) - self.now

    async def send(self, limiter: Limiter, who: Key, id: int, settled: Callable[[], Awaitable[None]]) -> None:
        """A request, which is allowed exactly if the account says so."""
        await self.end_requests()
        prompt, generated = self.random.randint(1, 30), self.random.randint(1, 70)
        requests, tokens = self.recent()
        verdict = await limiter.enter(who, id)
        assert (verdict.refused_by is None) == (requests < who.requests_per_minute)
        if verdict.refused_by is not None:
            self.refused += 1
            assert verdict.wait == self.least_wait([(at, 1) for at in self.requests], 1, who.requests_per_minute)
            return
        self.requests.append(self.now)
        used = prompt + self.random.randint(0, generated)
        spending = Spending(id + 1_000_000, prompt, prompt + generated, lambda: used)
        verdict = await limiter.reserve(who, spending)
        assert (verdict.refused_by is None) == (tokens + prompt + generated <= who.tokens_per_minute)
        if verdict.refused_by is not None:
            self.refused += 1
            assert verdict.wait == self.least_wait(self.tokens, prompt + generated, who.tokens_per_minute)
            return
        entry = [self.now, prompt + generated]
        self.tokens.append(entry)

        async def end() -> None:
            entry[1] = used
            limiter.settle(who, spending)
            limiter.leave(who, id)
            await settled()

        heapq.heappush(self.ends, (self.now + self.random.randint(0, 8 * self.longest) / 8, id, end))

    async def end_requests(self, everything: bool = False) -> None:
        while self.ends and (everything or self.ends[0][0] <= self.now):
            await heapq.heappop(self.ends)[2]()

    def check(self, who: Key) -> None:
        """In no minute is there more than the share."""
        for start in self.requests:
            assert sum(start <= at < start + 60 for at in self.requests) <= who.requests_per_minute
            assert sum(n for at, n in self.tokens if start <= at < start + 60) <= who.tokens_per_minute


async def nothing() -> None:
    pass


@pytest.mark.parametrize("seed", range(3))
def test_ten_minutes_at_five_times_the_rate(seed: int) -> None:
    """Two tenants that send too much get exactly their shares; one that stays within is never refused."""
    greedy = key("greedy", requests_per_minute=30, tokens_per_minute=1200)
    hungry = key("hungry", requests_per_minute=1000, tokens_per_minute=500)
    modest = key("modest", requests_per_minute=6, tokens_per_minute=600)
    worlds = {each.name: World(seed) for each in (greedy, hungry, modest)}
    clock = worlds["greedy"]
    limiter = LocalLimiter(lambda: clock.now, lambda: clock.now)

    async def run() -> None:
        for step in range(10 * 60 * 8):
            for who, rate in ((greedy, 5 * 30), (hungry, 5 * 500 / 51), (modest, 0)):
                world = worlds[who.name]
                world.now = MONTH_END - 3600 + step / 8
                within = step % 80 == 0  # every 10 s
                if within if who is modest else world.random.random() < rate / 480:
                    await world.send(limiter, who, step * 3, nothing)
        for each in worlds.values():
            await each.end_requests(everything=True)

    asyncio.run(run())
    for who in (greedy, hungry, modest):
        worlds[who.name].check(who)
    assert worlds["greedy"].refused > 500 and worlds["modest"].refused == 0 and len(worlds["modest"].tokens) == 60
    assert sum(n for _, n in worlds["hungry"].tokens) > 0.7 * 10 * 500


@asynccontextmanager
async def sharing(port: int, count: int, **options: Any) -> AsyncIterator[list[RedisLimiter]]:
    limiters = [RedisLimiter(f"redis://127.0.0.1:{port}/0", **options) for _ in range(count)]
    try:
        yield limiters
    finally:
        for limiter in limiters:
            await limiter.close()


async def sent(*limiters: RedisLimiter) -> None:
    """Until Redis has all that the limiters have sent without waiting."""
    for limiter in limiters:
        while limiter._sent:
            await asyncio.wait(set(limiter._sent))


def test_two_frontends_on_one_redis_are_exact_together() -> None:
    who, world = key("shared {1}", requests_per_minute=12, tokens_per_minute=400), World(7, longest=50)

    async def run(port: int) -> None:
        async with sharing(port, 2, clock=lambda: world.now, wall=lambda: world.now) as limiters:
            for step in range(600):
                world.now = MONTH_END - 3600 + step
                await world.send(limiters[step % 2], who, step, lambda: sent(*limiters))
            await world.end_requests(everything=True)
            assert await limiters[0].used_this_month(who) == sum(n for _, n in world.tokens)

    with redis_server() as server:
        asyncio.run(run(server.port))
    world.check(who)
    assert world.refused > 400 and len(world.tokens) > 50


def test_what_an_ended_frontend_had_reserved_is_given_back() -> None:
    who, now = key("a", concurrent_requests=1, monthly_tokens=100), [MONTH_END - 3600]

    async def run(port: int) -> None:
        async with sharing(port, 2, clock=lambda: now[0], wall=lambda: now[0]) as [ended, other]:
            await ended.enter(who, 1)
            await ended.reserve(who, Spending(2, 30, 90, lambda: 50))
            assert (await other.enter(who, 1)).refused_by == "concurrent"
            assert (await other.reserve(who, Spending(2, 1, 20, lambda: 5))).refused_by == "month"
            now[0] += 61  # its leases have ended; its prompt has been computed
            assert (await other.enter(who, 1)).refused_by is None
            assert (await other.reserve(who, Spending(2, 1, 80, lambda: 5))).is_final
            assert (await other.reserve(who, Spending(2, 1, 70, lambda: 5))).refused_by is None

    with redis_server() as server:
        asyncio.run(run(server.port))


def test_a_lost_redis(caplog: pytest.LogCaptureFixture) -> None:
    """It is said once; each frontend counts for itself; then they count together again."""
    who = key("a", requests_per_minute=3, tokens_per_minute=100)
    caplog.set_level("INFO", "octavo.server")

    async def passed(limiter: RedisLimiter) -> int:
        return sum([(await limiter.enter(who, id)).refused_by is None for id in range(5)])

    async def run() -> None:
        with redis_server() as server:
            async with sharing(server.port, 1) as [one], sharing(server.port, 1) as [other]:
                assert await passed(one) == 3 and await passed(other) == 0
                server.stop()
                spending = Spending(99, 5, 10, lambda: 8)
                assert (await one.reserve(who, spending)).remaining == 90 and await passed(one) == 3
                one.settle(who, spending)
                server.start()
                async with asyncio.timeout(10):
                    while one._is_lost:
                        await asyncio.sleep(0.05)
                assert await one.used_this_month(who) == 8 and await passed(one) == 3 and await passed(other) == 0

    asyncio.run(run())
    said = [each.message for each in caplog.records]
    assert len(said) == 2 and "by this server alone" in said[0] and "together again" in said[1]


@pytest.mark.parametrize("is_decided", [False, True])
def test_a_caller_that_is_cancelled_leaves_nothing_counted(is_decided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cancelled before Redis gets its question, or when Redis has decided and the reply is on its way."""
    who = key("a", requests_per_minute=1, concurrent_requests=1, tokens_per_minute=100, monthly_tokens=100)

    async def cancel(limiter: RedisLimiter, call: Awaitable[Any]) -> None:
        ask, held, release = limiter._ask, asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            held.set()
            await release.wait()

        async def asked_late(command: Callable[[], Awaitable[Any]]) -> Any:
            if not is_decided:
                await hold()
            reply = await ask(command)
            if is_decided:
                await hold()
            return reply

        with monkeypatch.context() as patch:
            patch.setattr(limiter, "_ask", asked_late)
            task = asyncio.ensure_future(call)
            await held.wait()
            task.cancel()
            await asyncio.wait([task])
            release.set()
            while not limiter._sent:
                await asyncio.sleep(0)
            await sent(limiter)
        assert task.cancelled()

    async def run(port: int) -> None:
        async with sharing(port, 2) as [one, other]:
            await cancel(one, one.enter(who, 1))
            await cancel(one, one.reserve(who, Spending(2, 9, 90, int)))
            assert (await other.enter(who, 1)).refused_by is None
            assert (await other.reserve(who, Spending(2, 9, 100, int))).remaining == 0
            assert not one._leases

    with redis_server() as server:
        asyncio.run(asyncio.wait_for(run(server.port), 30))


def test_a_question_that_is_asked_again_counts_once() -> None:
    """As the client does when a reply is lost with its connection."""
    who = key("a", requests_per_minute=9, concurrent_requests=9, tokens_per_minute=100, monthly_tokens=100)

    async def run(port: int) -> None:
        async with sharing(port, 2) as [one, other]:
            for _ in range(2):
                assert (await one.enter(who, 1)).remaining == 8
                assert (await one.reserve(who, Spending(2, 9, 40, lambda: 10))).remaining == 60
            assert (await other.enter(who, 1)).remaining == 7
            assert (await other.reserve(who, Spending(2, 9, 60, lambda: 10))).remaining == 0
            for limiter in (one, other):
                for _ in range(2):
                    limiter._leases[2] = who.name
                    limiter.settle(who, Spending(2, 9, 60, lambda: 10))
            await sent(one, other)
            assert await one.used_this_month(who) == 20

    with redis_server() as server:
        asyncio.run(run(server.port))


def test_an_account_that_appears_while_months_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_limiter, "LOOK_SECONDS", 0.01)
    first, second = key("first"), key("second")

    async def spend(limiter: RedisLimiter, who: Key) -> None:
        spending = Spending(len(limiter._local.accounts), 1, 9, lambda: 5)
        await limiter.reserve(who, spending)
        limiter.settle(who, spending)

    async def run(port: int) -> None:
        async with sharing(port, 2) as [one, other]:
            add = one._redis.hincrby

            async def add_late(*arguments: Any) -> int:
                if "second" not in one._local.accounts:
                    await spend(one, second)
                return int(await add(*arguments))

            monkeypatch.setattr(one._redis, "hincrby", add_late)
            await spend(one, first)
            await one.used_this_month(first)  # begins to watch
            while await other.used_this_month(first) + await other.used_this_month(second) < 10:
                assert one._watch is not None and not one._watch.done()
                await asyncio.sleep(0.01)

    with redis_server() as server:
        asyncio.run(asyncio.wait_for(run(server.port), 30))


def test_a_wrong_url() -> None:
    with pytest.raises(ConfigError, match="rate_limit_store must be a URL such as redis"):
        RedisLimiter("localhost:6379")


def journaled(path: Path, now: Callable[[], float]) -> tuple[LocalLimiter, Database]:
    database, limiter = Database(path), LocalLimiter(lambda: now() - 5e8, now)
    UsageJournal(database, limiter, lambda: now() - 5e8, now)
    return limiter, database


def test_a_restart_keeps_what_was_used(tmp_path: Path) -> None:
    who, now = key("a", requests_per_minute=5, tokens_per_minute=100, monthly_tokens=10_000), [MONTH_END - 3600]

    async def before() -> None:
        limiter, database = journaled(tmp_path / "o.db", lambda: now[0])
        for id, used in enumerate((30, 20, 15)):
            assert (await limiter.enter(who, id)).refused_by is None
            spending = Spending(10 + id, 10, 40, lambda used=used: used)  # type: ignore[misc]
            assert (await limiter.reserve(who, spending)).refused_by is None
            if id < 2:
                limiter.settle(who, spending)
            limiter.leave(who, id)
            now[0] += 10
        await limiter.close()
        database.close()

    async def after() -> None:
        limiter, database = journaled(tmp_path / "o.db", lambda: now[0])
        assert [(await limiter.enter(who, id)).refused_by for id in range(3)] == [None, None, "requests"]
        assert await limiter.used_this_month(who) == 65
        assert (await limiter.reserve(who, Spending(9, 11, 11, int))).wait == 30  # the third still holds 40
        assert (await limiter.reserve(who, Spending(9, 10, 10, int))).remaining == 0
        now[0] += 30
        assert (await limiter.reserve(who, Spending(8, 30, 30, int))).refused_by is None
        await limiter.close()
        database.close()
        now[0] = MONTH_END + 61
        limiter, database = journaled(tmp_path / "o.db", lambda: now[0])
        assert await limiter.used_this_month(who) == 0
        database.close()

    asyncio.run(before())
    asyncio.run(after())
    with sqlite3.connect(tmp_path / "o.db") as connection:
        assert connection.execute("SELECT count(*) FROM key_months").fetchone() == (1,)


def test_the_budget_of_a_month() -> None:
    who, now = key("a", monthly_tokens=100), [MONTH_END]

    async def run() -> None:
        limiter = LocalLimiter(lambda: now[0], lambda: now[0])
        first = Spending(1, 10, 60, lambda: 30)
        await limiter.reserve(who, first)
        verdict = await limiter.reserve(who, Spending(2, 10, 50, int))
        assert verdict.refused_by == "month" and verdict.wait == 1  # the first may give something back
        limiter.settle(who, first)
        late = Spending(3, 10, 70, lambda: 70)
        assert (await limiter.reserve(who, late)).refused_by is None
        assert (await limiter.reserve(who, Spending(4, 10, 80, int))).wait == 60
        now[0] += 60
        assert (await limiter.reserve(who, Spending(5, 10, 100, int))).refused_by is None
        limiter.settle(who, late)  # counts in the month in which it began
        assert await limiter.used_this_month(who) == 0

    asyncio.run(run())
    assert seconds_to_next_month(datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()) == 1


def test_waiting_is_fair() -> None:
    """A flood of one key waits in order, at its rate; a key within its rate is never held up by it."""
    flood, calm = key("flood", requests_per_minute=10), key("calm", requests_per_minute=10)
    admitted: list[tuple[str, int, float]] = []
    refusals: list[int] = []

    with virtual_loop() as loop:
        traffic = Traffic()  # each request is counted by the dispatcher, before
        limits = KeyLimits(LocalLimiter(loop.time, lambda: 1e9 + loop.time()), waits=True, traffic=traffic)
        start = loop.time()

        async def send(who: Key, number: int, timeout: float | None = None) -> None:
            use = KeyUse(limits, who, RequestRecord("1", "POST", "/", "-"), may_wait=True)
            try:
                await use.enter(timeout)
            except ApiError as error:
                assert error.status == 429 and "retry-after" in (error_headers(error) or {})
                refusals.append(number)
                return
            admitted.append((who.name, number, round(loop.time() - start, 2)))
            use.leave()

        async def run() -> None:
            flooding = [asyncio.ensure_future(send(flood, n)) for n in range(MAX_WAITING + 13)]
            await asyncio.sleep(0.1)
            impatient = asyncio.ensure_future(send(flood, 1000, timeout=5))
            for gone in (12, 15, 16):
                flooding[gone].cancel()
            await asyncio.sleep(0.1)
            late = asyncio.ensure_future(send(flood, 2000))
            await asyncio.sleep(0.1)
            assert traffic.count == -(MAX_WAITING - 3 + 1)
            for n in range(30):
                await send(calm, n)
                await asyncio.sleep(6)
            await asyncio.gather(*flooding, late, impatient, return_exceptions=True)

        loop.run_until_complete(run())
    assert traffic.count == 0
    of_calm = [at for name, _, at in admitted if name == "calm"]
    assert of_calm == pytest.approx([0.3 + 6 * n for n in range(30)], abs=0.05)
    of_flood = [(number, at) for name, number, at in admitted if name == "flood"]
    assert [number for number, _ in of_flood] == [n for n in range(MAX_WAITING + 10) if n not in (12, 15, 16)] + [2000]
    assert [at for _, at in of_flood] == pytest.approx([60.0 * (n // 10) for n in range(len(of_flood))], abs=0.1)
    assert refusals == [MAX_WAITING + 10, MAX_WAITING + 11, MAX_WAITING + 12, 1000]


def test_tokens_wait_for_what_others_give_back() -> None:
    who, order = key("a", tokens_per_minute=100), list[str]()

    with virtual_loop() as loop:
        limits = KeyLimits(LocalLimiter(loop.time, lambda: 1e9 + loop.time()), waits=True)

        async def send(name: str, generated: int, seconds: float, used: int) -> None:
            use = KeyUse(limits, who, RequestRecord("1", "POST", "/", "-"), may_wait=True)
            async with use.spending(10, generated, None) as tally:
                order.append(f"{name} {loop.time() - start:.0f}")
                await asyncio.sleep(seconds)
                tally.add(used)

        async def run() -> None:
            tasks = [asyncio.ensure_future(send(*each)) for each in SENT]
            await asyncio.gather(*tasks)
            with pytest.raises(ApiError) as error:
                await send("too large", 91, 1, 1)
            status, reply = error_reply(error.value)
            assert (status, reply.error.type, reply.error.code) == (429, "tokens", "rate_limit_exceeded")
            assert "request too large for the 100 tokens per minute" in reply.error.message
            assert error_headers(error.value) == {"x-should-retry": "false"}

        SENT = [("first", 80, 5.0, 30), ("large", 50, 1.0, 60), ("small", 0, 1.0, 10), ("next", 20, 1.0, 30)]
        start = loop.time()
        loop.run_until_complete(run())
    assert order == ["first 0", "large 5", "small 5", "next 60"]  # in order, though small would have fit at first
