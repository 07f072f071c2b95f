"""Limits of API keys on real servers: every route counts, restarts keep them, and several servers count as one."""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from octavo.tenants.key_file import add_key
from redis_process import redis_server
from server_process import ServerProcess

LIMITS: dict[str, dict[str, Any]] = {
    "small": {"tokens_per_minute": 100},
    "month": {"monthly_tokens": 60},
    "counted": {"tokens_per_minute": 1_000_000, "tenant": "counted"},
    "heavy": {"tokens_per_minute": 300, "requests_per_minute": 1000, "weight": 3.0},
    "rare": {"requests_per_minute": 15},
    "short": {"max_new_tokens": 6},
    "late": {"min_priority": 1},
    "free": {},
}


class Killed(Exception):
    """Ends the block of a server that the test has killed, which need not drain."""


class Limited(NamedTuple):
    server: ServerProcess
    secrets: dict[str, str]

    def send(self, name: str, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.secrets[name]}"}
        return httpx.post(self.server.url + path, json={"model": "tiny"} | body, headers=headers, timeout=60, **options)

    def complete(self, name: str, max_tokens: int, **more: Any) -> httpx.Response:
        body = {"prompt": "Hello", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return self.send(name, "/v1/completions", body | more)

    def used(self, name: str) -> int:
        """Tokens of a key this month, as the operator sees them."""
        reply = httpx.get(f"{self.server.url}/v1/admin/keys", headers={"Authorization": "Bearer root"}, timeout=60)
        [key] = [key for key in reply.json()["data"] if key["name"] == name]
        return int(key["tokens_this_month"])


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    return path, {name: add_key(path, name=name, **each) for name, each in LIMITS.items()}


@contextlib.contextmanager
def limited(model: Path, keys: tuple[Path, dict[str, str]], *flags: str) -> Iterator[Limited]:
    with ServerProcess(model, "--keys", str(keys[0]), "--admin-key", "root", *flags) as server:
        yield Limited(server, keys[1])


@pytest.fixture(scope="module")
def one(tiny_llama: Path, keys: tuple[Path, dict[str, str]]) -> Iterator[Limited]:
    with limited(tiny_llama, keys, "--scheduling-policy", "fair") as server:
        yield server


def test_tokens_per_minute(one: Limited) -> None:
    client = openai.OpenAI(base_url=f"{one.server.url}/v1", api_key=one.secrets["small"], max_retries=0)
    reply = one.complete("small", 20)
    usage = reply.json()["usage"]
    prompt = usage["prompt_tokens"]
    assert usage["completion_tokens"] == 20
    assert reply.headers["x-ratelimit-limit-tokens"] == "100"
    assert reply.headers["x-ratelimit-remaining-tokens"] == str(100 - prompt - 20)
    assert 59 < float(reply.headers["x-ratelimit-reset-tokens"].removesuffix("s")) <= 60
    # Of 60 tokens, the stop string leaves a few, and the others are given back.
    first = one.complete("small", 1).json()["choices"][0]["text"]
    left = 100 - prompt - 20 - prompt - 1
    stopped = one.complete("small", 60, stop=[first])
    assert stopped.headers["x-ratelimit-remaining-tokens"] == str(left - prompt - 60)
    left -= stopped.json()["usage"]["total_tokens"]
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model="tiny", prompt="Hello", max_tokens=left, stream=True)
    body = error.value.response.json()["error"]
    assert (body["code"], body["type"]) == ("rate_limit_exceeded", "tokens") and f"{left} are left" in body["message"]
    assert 0 < int(error.value.response.headers["retry-after"]) <= 60
    assert error.value.response.headers["x-ratelimit-remaining-tokens"] == str(left)
    too_large = one.send("small", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]})
    assert too_large.status_code == 429 and too_large.headers["x-should-retry"] == "false"
    assert "request too large" in too_large.text and "send a lower max_tokens" in too_large.text


def test_every_route_counts_what_it_computes(one: Limited) -> None:
    hello = [{"role": "user", "content": "Hello"}]
    chat = {"messages": hello, "max_tokens": 5}
    documents = {"documents": ["A cat.", "A dog."]}
    question = {"type": "predicate", "name": "x", "instructions": "Is it?"}
    routes: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", chat | {"stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"prompt": ["Hello", "You"], "max_tokens": 5, "n": 2}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 16}),
        ("/v1/messages", chat),
        ("/api/chat", {"messages": hello, "stream": False, "options": {"num_predict": 5}}),
        ("/api/generate", {"prompt": "Hello", "options": {"num_predict": 5}}),
        ("/v1/embeddings", {"input": ["A cat.", "A dog."]}),
        ("/api/embed", {"input": "A cat."}),
        ("/score", documents | {"queries": "Where?", "labels": ["a", "b"]}),
        ("/rerank", documents | {"query": "Where?", "labels": ["a", "b"]}),
        ("/v1/decisions", {"input": "A cat.", "questions": [question]}),
    ]
    for path, body in routes:
        before = one.used("counted")
        reply = one.send("counted", path, body)
        assert reply.status_code == 200, (path, reply.text)
        assert reply.headers["x-ratelimit-limit-tokens"] == "1000000", path
        assert one.used("counted") - before == total_tokens(reply) > 0, (path, reply.text)
    kept = one.complete("counted", 20, kv_cache_state=True).json()["kv_cache_state"]["id"]
    before = one.used("counted")
    usage = one.complete("counted", 2, kv_cache_state=kept).json()["usage"]
    assert one.used("counted") - before == usage["total_tokens"] > 22  # the state's tokens belong to the prompt
    before = one.used("counted")
    beams = one.complete("counted", 3, use_beam_search=True, n=2).json()["usage"]
    assert one.used("counted") - before == beams["prompt_tokens"] + 1 + 2 + 2  # one beam becomes two
    for path, body in (("/v1/messages/count_tokens", {"messages": hello}), ("/tokenize", {"prompt": "Hello"})):
        before = one.used("counted")
        assert one.send("counted", path, body).status_code == 200
        assert one.used("counted") == before


def total_tokens(reply: httpx.Response) -> int:
    """Of a reply in any dialect; of a stream, what its last object says."""
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line not in ("", "data: [DONE]")]
    body = json.loads(reply.text if len(lines) == 1 else lines[-1])
    usage = body.get("usage", body)
    if "total_tokens" in usage:
        return int(usage["total_tokens"])
    names = ("input_tokens", "cache_read_input_tokens", "output_tokens", "prompt_eval_count", "eval_count")
    return sum(usage.get(name, 0) for name in names)


def test_a_client_that_leaves_is_charged_for_what_was_computed(one: Limited) -> None:
    before = one.used("counted")
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {one.secrets['counted']}"}
    with httpx.stream("POST", f"{one.server.url}/v1/completions", json=body, headers=headers, timeout=60) as reply:
        next(reply.iter_lines())
    end = time.monotonic() + 10
    while (used := one.used("counted")) == before or used != one.used("counted"):
        assert time.monotonic() < end
    remaining = int(one.complete("counted", 1).headers["x-ratelimit-remaining-tokens"])
    assert 1_000_000 - remaining < used + 20  # nothing stays reserved


def test_a_budget_of_tokens_for_the_month(one: Limited) -> None:
    client = openai.OpenAI(base_url=f"{one.server.url}/v1", api_key=one.secrets["month"], max_retries=0)
    body = {"ignore_eos": True}
    assert client.completions.create(model="tiny", prompt="Hello", max_tokens=40, extra_body=body).usage is not None
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model="tiny", prompt="Hello", max_tokens=40)
    assert (error.value.code, error.value.type) == ("insufficient_quota", "insufficient_quota")


def test_a_key_limits_the_length_of_completions(one: Limited) -> None:
    hello = [{"role": "user", "content": "Hello"}]
    for more in ({}, {"max_tokens": 100}, {"max_tokens": 100, "min_tokens": 50}, {"max_tokens": 4}):
        reply = one.send("short", "/v1/chat/completions", {"messages": hello, "ignore_eos": True, **more}).json()
        expected = min(6, more.get("max_tokens", 6))
        assert reply["usage"]["completion_tokens"] == expected and reply["choices"][0]["finish_reason"] == "length"
    beams = one.complete("short", 100, use_beam_search=True, n=2).json()["usage"]
    assert beams["completion_tokens"] == 12


def test_a_restart_keeps_what_was_used(tiny_llama: Path, keys: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """Drained, or killed: then at most the last tenth of a second is lost."""
    data = ["--data-dir", str(tmp_path)]
    with limited(tiny_llama, keys, *data) as server:
        batch = {"model": None, "input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"}
        for name in ("month", "small", "short", "late"):  # rows could be used past the limits
            assert server.send(name, "/v1/batches", batch).status_code == 403, name
        assert server.send("free", "/v1/batches", batch).status_code == 404  # there is no such file
        used = server.complete("heavy", 30).json()["usage"]["total_tokens"]
    with pytest.raises(Killed), limited(tiny_llama, keys, *data) as server:
        assert server.used("heavy") == used
        reply = server.complete("heavy", 20)
        assert reply.headers["x-ratelimit-remaining-tokens"] == str(300 - used - reply.json()["usage"]["total_tokens"])
        assert reply.headers["x-ratelimit-remaining-requests"] == "998"
        used += reply.json()["usage"]["total_tokens"]
        time.sleep(0.5)
        server.server.process.kill()
        server.server.process.wait()
        raise Killed
    with limited(tiny_llama, keys, *data) as server:
        assert server.used("heavy") == used
        assert server.complete("heavy", 1).headers["x-ratelimit-remaining-requests"] == "997"


def test_two_servers_on_one_redis_are_one(tiny_llama: Path, keys: tuple[Path, dict[str, str]]) -> None:
    with (
        redis_server() as redis,
        limited(tiny_llama, keys, "--rate-limit-store", redis.url) as first,
        limited(tiny_llama, keys, "--rate-limit-store", redis.url) as second,
        ThreadPoolExecutor(8) as threads,
    ):
        servers = [first, second] * 20
        replies = list(threads.map(lambda server: server.complete("rare", 1), servers))
        assert sorted(reply.status_code for reply in replies) == [200] * 15 + [429] * 25
        replies = list(threads.map(lambda server: server.complete("heavy", 20), servers))
        passed = [reply.json()["usage"]["total_tokens"] for reply in replies if reply.status_code == 200]
        assert sum(passed) <= 300 < sum(passed) + 2 * max(passed)
        assert first.used("heavy") == second.used("heavy") == sum(passed)
        redis.stop()
        assert first.complete("heavy", 20).status_code == 200  # each counts for itself
        assert first.complete("heavy", 20).headers["x-ratelimit-remaining-requests"] == "998"
        assert first.server.stderr().count("Redis") == 1
        redis.start()


def test_requests_over_the_rate_wait(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    secrets = {"one": add_key(path, name="one", concurrent_requests=1, tokens_per_minute=500)}
    with limited(tiny_llama, (path, secrets), "--rate-limit-mode", "queue") as server:

        async def run() -> None:
            headers = {"Authorization": f"Bearer {secrets['one']}"}
            body = {"model": "tiny", "prompt": "Hello", "max_tokens": 40, "ignore_eos": True}
            async with httpx.AsyncClient(base_url=server.server.url, headers=headers, timeout=60) as client:

                def send(**more: Any) -> "asyncio.Task[httpx.Response]":
                    return asyncio.create_task(client.post("/v1/completions", json=body | more))

                replies = await asyncio.gather(*(send() for _ in range(8)))
                assert [reply.status_code for reply in replies] == [200] * 8
                assert (await send(max_tokens=400, timeout=1)).status_code == 429  # not within its timeout

        asyncio.run(run())
