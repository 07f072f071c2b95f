"""What the limits of an API key cost a request: python benchmarks/key_limits.py [--redis URL]

Microseconds of a request with limits of requests and tokens (two decisions, and two notes of its end), for 20 requests
at a time: counted in memory, in memory and SQLite, and, with --redis, in Redis; and the time that a decision waits.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from octavo.server.database import Database
from octavo.tenants.key import Key, secret_hash
from octavo.tenants.limiter import Limiter, Spending
from octavo.tenants.local_limiter import LocalLimiter
from octavo.tenants.usage_journal import UsageJournal

AT_ONCE = 20
KEY = Key(
    name="benchmark",
    hash=secret_hash("benchmark"),
    requests_per_minute=10**6,
    tokens_per_minute=10**9,
    monthly_tokens=10**12,
    concurrent_requests=1000,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", help="URL of a Redis, such as redis://127.0.0.1:6379/0")
    parser.add_argument("--requests", type=int, default=20_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, Callable[[], Limiter]] = {
            "memory": LocalLimiter,
            "memory and SQLite": lambda: journaled(Path(folder)),
        }
        if args.redis:
            from octavo.tenants.redis_limiter import RedisLimiter

            makers["Redis"] = lambda: RedisLimiter(args.redis)
        for name, make in makers.items():
            cost, latency = asyncio.run(measure(make, args.requests))
            print(f"{name:<18} {1e6 * cost:7.1f} us a request; a decision waits {1e6 * latency:7.1f} us")


def journaled(folder: Path) -> LocalLimiter:
    limiter = LocalLimiter()
    UsageJournal(Database(folder / "octavo.db"), limiter)
    return limiter


async def measure(make: Callable[[], Limiter], count: int) -> tuple[float, float]:
    """Return the seconds of a request, with AT_ONCE at a time, and of a decision."""
    limiter, waited = make(), 0.0

    async def requests(first: int) -> None:
        nonlocal waited
        for id in range(first, count, AT_ONCE):
            began = time.perf_counter()
            verdict = await limiter.enter(KEY, id)
            spending = Spending(count + id, 10, 50, lambda: 30)
            other = await limiter.reserve(KEY, spending)
            waited += time.perf_counter() - began
            assert verdict.refused_by is None and other.refused_by is None
            limiter.settle(KEY, spending)
            limiter.leave(KEY, id)
            await asyncio.sleep(0)

    began = time.perf_counter()
    await asyncio.gather(*(requests(first) for first in range(AT_ONCE)))
    taken = time.perf_counter() - began
    await limiter.close()
    return taken / count, waited / count / 2


if __name__ == "__main__":
    main()
