"""Metrics check: the figures of GET /metrics against those that clients have counted, while engines are killed.

    python benchmarks/metrics_check.py [--model smollm2] [--requests 5000] [--rate 40] [--kills 10] [--replicas 2]

Tenants send streams, chats, requests with n = 2, and wrong ones. One tenant leaves in the middle of its streams, or
sets a timeout that is too short. Engines are killed in between, and a scrape each half second checks that no counter
goes down. Then both sides must agree: on counts exactly, on quantiles of latencies within a bucket. What HTTP takes
(10 ms) and how late this process itself is, where other programs use the processor, may be missing at the server: the
table shows the latter, which counts twice, for sending and for receiving. The exit code is 1 if they do not agree, or
if a request was lost.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Process
from typing import Any

import httpx
from live_server import LiveServer
from scrape import Scrape

from octavo.frontend.meter import FIRST_TOKEN, REQUEST

STREAMS = "streams"  # the tenant of all streams: only these show a client when the first token came
TENANTS = ("alpha", "beta", STREAMS)
LEAVER = "leaver"  # the tenant whose requests end early, so that it cannot know how many tokens were generated
HTTP = 0.01  # seconds
QUANTILES = (0.5, 0.9, 0.99)
LEFT = 8  # completions of a request whose client leaves: many, so that few end before that is noticed
REASONS = ("stop", "length", "abort", "error", "repetition")
REQUESTS, ENDED = "vllm_requests_total", "vllm:request_success_total"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass
class Counted:
    """What clients have counted.

    Attributes:
        numbers: by name, such as "requests", and tenant.
        reasons: why completions have ended.
        http: replies by route and class of status.
        first_token, request: seconds, of streams and of all requests that were answered.
        delays: by how many seconds this process did something too late, looked at all the time.
        lost: why requests were lost.
    """

    numbers: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    http: Counter[tuple[str, str]] = field(default_factory=Counter)
    first_token: list[float] = field(default_factory=list)
    request: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def ended(self, tenant: str, usage: dict[str, Any], reasons: Iterable[str], seconds: float) -> None:
        """Count a request that was answered."""
        self.numbers["requests", tenant] += 1
        self.numbers["prompt tokens", tenant] += usage["prompt_tokens"]
        self.numbers["cached tokens", tenant] += usage["prompt_tokens_details"]["cached_tokens"]
        self.numbers["generated tokens", tenant] += usage["completion_tokens"]
        self.reasons.update(reasons)
        self.request.append(seconds)

    def ended_early(self, reason: str, completions: int) -> None:
        self.numbers["requests", LEAVER] += 1
        self.reasons[reason] += completions


class Clients:
    """Clients that send `total` requests of all kinds, at random times, so many per second."""

    def __init__(self, url: str, total: int, rate: float, seed: int):
        self.counted, self.sent = Counted(), 0
        self._total, self._rate, self._seed = total, rate, seed
        self._http = httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None))
        self._model = ""

    async def run(self) -> None:
        self._model = (await self._http.get("/v1/models")).json()["data"][0]["id"]
        choose = random.Random(self._seed)
        delays = asyncio.ensure_future(self._note_delays())
        async with asyncio.TaskGroup() as requests:
            while self.sent < self._total:
                self.sent += 1
                requests.create_task(self._request(random.Random(f"{self._seed} {self.sent}")))
                await asyncio.sleep(choose.expovariate(self._rate))
        delays.cancel()
        await self._http.aclose()

    async def _note_delays(self) -> None:
        while True:
            due = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            self.counted.delays.append(time.perf_counter() - due)

    async def _request(self, choose: random.Random) -> None:
        kinds = (self._whole, self._stream, self._chat, self._leave, self._time_out, self._wrong)
        [kind] = choose.choices(kinds, (4, 6, 4, 1, 1, 1))
        early = kind in (self._leave, self._time_out)
        tenant = LEAVER if early else STREAMS if kind == self._stream else choose.choice(TENANTS[:2])
        prompt = f"Story {choose.randrange(40)}: " + "once upon a time " * choose.randrange(8)
        common = {"model": self._model, "seed": choose.randrange(1000), "temperature": 1.0}
        try:
            await kind(tenant, prompt, common | {"max_tokens": choose.randrange(1, 60)})
        except (httpx.HTTPError, KeyError, RuntimeError) as error:
            self.counted.lost.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    async def _post(self, path: str, tenant: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
        reply = await self._http.post(path, json=body, headers={"X-Octavo-Tenant": tenant})
        self.counted.http[path, f"{reply.status_code // 100}xx"] += 1
        if reply.status_code != status:
            raise RuntimeError(f"status {reply.status_code}: {reply.text[:200]}")
        content: dict[str, Any] = reply.json()
        return content

    async def _whole(self, tenant: str, prompt: str, body: dict[str, Any]) -> None:
        began = time.perf_counter()
        reply = await self._post(COMPLETIONS, tenant, body | {"prompt": prompt, "n": 2})
        seconds = time.perf_counter() - began
        self.counted.ended(tenant, reply["usage"], [each["finish_reason"] for each in reply["choices"]], seconds)

    async def _chat(self, tenant: str, prompt: str, body: dict[str, Any]) -> None:
        began = time.perf_counter()
        reply = await self._post(CHAT, tenant, body | {"messages": [{"role": "user", "content": prompt}]})
        seconds = time.perf_counter() - began
        self.counted.ended(tenant, reply["usage"], [reply["choices"][0]["finish_reason"]], seconds)

    async def _stream(self, tenant: str, prompt: str, body: dict[str, Any]) -> None:
        """Measure a stream as a client sees it."""
        options = {"prompt": prompt, "stream": True, "stream_options": {"include_usage": True}}
        began, first = time.perf_counter(), None
        reasons, usage = list[str](), dict[str, Any]()
        headers = {"X-Octavo-Tenant": tenant}
        async with self._http.stream("POST", COMPLETIONS, json=body | options, headers=headers) as reply:
            self.counted.http[COMPLETIONS, f"{reply.status_code // 100}xx"] += 1
            async for line in lines(reply):
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    usage = event.get("usage") or usage
                    first = first or time.perf_counter()
                    reasons += [each["finish_reason"] for each in event["choices"] if each["finish_reason"]]
        if not usage or first is None:
            raise RuntimeError("the stream ended early")
        self.counted.ended(tenant, usage, reasons, time.perf_counter() - began)
        self.counted.first_token.append(first - began)

    async def _leave(self, tenant: str, prompt: str, body: dict[str, Any]) -> None:
        options = {"prompt": prompt, "stream": True, "max_tokens": 300, "ignore_eos": True, "n": LEFT}
        headers = {"X-Octavo-Tenant": tenant}
        async with self._http.stream("POST", COMPLETIONS, json=body | options, headers=headers) as reply:
            async for _ in reply.aiter_raw():
                break
        self.counted.http[COMPLETIONS, "4xx"] += 1  # 499: the client has left
        self.counted.ended_early("abort", LEFT)

    async def _time_out(self, tenant: str, prompt: str, body: dict[str, Any]) -> None:
        options = {"prompt": prompt, "max_tokens": 400, "ignore_eos": True, "timeout": 0.005}
        await self._post(COMPLETIONS, tenant, body | options, status=504)
        self.counted.ended_early("error", 1)

    async def _wrong(self, tenant: str, prompt: str, body: dict[str, Any]) -> None:
        await self._post(COMPLETIONS, tenant, body | {"prompt": prompt, "temperature": -1}, status=400)


async def lines(reply: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the lines of a stream. (httpx's own method also splits at Unicode's line ends, which a token may be.)"""
    rest = b""
    async for piece in reply.aiter_raw():
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line


class Kills:
    """Kills an engine whenever a share of the requests was sent.

    Attributes:
        seen: the pids of all engines; one that the server has replaced by itself, as it was stuck, too.
    """

    def __init__(self, server: LiveServer, clients: Clients, arguments: argparse.Namespace):
        self._server, self._clients = server, clients
        self._pause, self._kills = arguments.requests / (arguments.kills + 1), arguments.kills
        self._killed = set[int]()
        self.seen = set(server.engine_pids())

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            engines = set(self._server.engine_pids())
            self.seen |= engines
            is_due = self._clients.sent > (len(self._killed) + 1) * self._pause
            if is_due and len(self._killed) < self._kills and (alive := engines - self._killed):
                self._killed.add(min(alive))
                os.kill(min(alive), signal.SIGKILL)


def watch(url: str) -> None:
    """Check each half second that no counter has gone down. It takes a process of its own, not the clients' time."""
    latest = Scrape(url)
    while True:
        time.sleep(0.5)
        scrape = Scrape(url)
        scrape.grew(latest)
        latest = scrape


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    clients: str
    server: str
    agrees: bool


class Expected:
    """What the server should have counted.

    Args:
        late: requests that had ended before the server noticed that their client had left. Clients cannot know.
    """

    def __init__(self, counted: Counted, late: int):
        self.reasons = counted.reasons + Counter(length=late * LEFT)
        self.reasons["abort"] -= late * LEFT
        self.http = counted.http + Counter({(COMPLETIONS, "2xx"): late})
        self.http[COMPLETIONS, "4xx"] -= late
        self.measured = len(counted.request) + late


def count(name: str, clients: float, server: float) -> Row:
    return Row(name, f"{clients:,.0f}", f"{server:,.0f}", clients == server)


def compare(counted: Counted, scrape: Scrape, restarts: int) -> Iterator[Row]:
    """Yield the figures of both sides."""
    families = {
        "requests": REQUESTS,
        "prompt tokens": "vllm:prompt_tokens_total",
        "cached tokens": "vllm:prompt_tokens_cached_total",
        "generated tokens": "vllm_tokens_generated",
    }
    for name, family in families.items():
        for tenant in TENANTS:
            yield count(f"{name} of {tenant}", counted.numbers[name, tenant], scrape.sum(family, tenant=tenant))
    expected = Expected(counted, int(scrape.sum(ENDED, tenant=LEAVER, finished_reason="length")) // LEFT)
    yield count(f"requests of {LEAVER}", counted.numbers["requests", LEAVER], scrape.sum(REQUESTS, tenant=LEAVER))
    for reason in REASONS:
        yield count(f"completions: {reason}", expected.reasons[reason], scrape.sum(ENDED, finished_reason=reason))
    for (path, status), number in sorted(expected.http.items()):
        yield count(f"{path}: {status}", number, scrape.sum("http_requests_total", handler=path, status=status))
    yield count("engine restarts", restarts, scrape.sum("octavo_engine_restarts_total"))
    yield count("requests measured", expected.measured, scrape.sum("vllm:e2e_request_latency_seconds_count"))
    for name, seconds, bounds, family in (
        ("first token", counted.first_token, FIRST_TOKEN, "time_to_first_token"),
        ("whole request", counted.request, REQUEST, "e2e_request_latency"),
    ):
        yield from quantiles(name, seconds, counted.delays, bounds, cumulative(scrape, family))


def cumulative(scrape: Scrape, name: str) -> list[float]:
    """Return the number of values up to each bound, of streams if there is a tenant, and of all."""
    found = defaultdict[float, float](float)
    for each in scrape.samples:
        if each.name == f"vllm:{name}_seconds_bucket" and each.labels.get("tenant", STREAMS) == STREAMS:
            found[float(each.labels["le"])] += each.value
    return [found[bound] for bound in sorted(found)]


def quantiles(
    name: str, seconds: list[float], delays: list[float], bounds: Sequence[float], counts: list[float]
) -> Iterator[Row]:
    """Yield quantiles: of the clients' seconds, and the bucket in which the server has them."""
    ends = [*map(float, bounds), float("inf")]
    for quantile in QUANTILES:
        measured, delay = at(quantile, seconds), at(quantile, delays)
        bucket = next(number for number, below in enumerate(counts) if below > quantile * counts[-1])
        earliest, latest = bisect_left(ends, measured - HTTP - 2 * delay), bisect_left(ends, measured)
        range = f"{ends[bucket - 1] if bucket else 0:g} to {ends[bucket]:g} s"
        clients = f"{measured:.3f} s (late {delay:.3f})"
        yield Row(f"{name}, p{quantile * 100:g}", clients, range, earliest - 1 <= bucket <= latest + 1)


def at(quantile: float, values: list[float]) -> float:
    """Return a quantile."""
    return sorted(values)[int(quantile * len(values))]


async def check(server: LiveServer, arguments: argparse.Namespace) -> tuple[Counted, list[Row]]:
    clients = Clients(server.url, arguments.requests, arguments.rate, arguments.seed)
    kills = Kills(server, clients, arguments)
    killing = asyncio.ensure_future(kills.run())
    watching = Process(target=watch, args=(server.url,), daemon=True)
    watching.start()
    await clients.run()
    for _ in range(40):  # a client that has left, and an engine that was killed, are noticed a moment later
        await asyncio.sleep(0.25)
        restarts = len(kills.seen) - arguments.replicas
        rows = list(compare(clients.counted, await asyncio.to_thread(Scrape, server.url), restarts))
        if all(row.agrees for row in rows):
            break
    killing.cancel()
    assert watching.is_alive(), "a counter went down"
    watching.terminate()
    return clients.counted, rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=40.0, help="requests per second")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    flags = ("--enable-metrics", "--data-parallel-size", str(arguments.replicas), "--access-log", "none")
    with LiveServer(arguments.model, flags) as server:
        counted, rows = asyncio.run(check(server, arguments))
    width = max(len(row.name) for row in rows)
    print(f"{'':{width}}  {'clients':>20}  {'server':>14}")
    for row in rows:
        print(f"{row.name:{width}}  {row.clients:>20}  {row.server:>14}  {'' if row.agrees else '<- differs'}")
    differing = sum(not row.agrees for row in rows)
    print(f"{arguments.requests} requests, lost: {len(counted.lost)}, figures that differ: {differing}")
    for line in counted.lost[:5]:
        print(" ", line)
    return 1 if counted.lost or differing else 0


if __name__ == "__main__":
    sys.exit(main())
