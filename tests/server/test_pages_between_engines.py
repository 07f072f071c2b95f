"""Engines in processes of their own that fetch pages from each other over TCP, and that have roles.

A step sleeps for SECONDS_PER_TOKEN more for each of its tokens, so that pages of the tiny model are worth fetching.
"""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_process import COMMAND, RemoteEngine
from fleet_server import until
from server_process import ServerProcess

STREAMS, TOKENS, PROMPT = 8, 40, 320  # PROMPT: about as many tokens as each prompt has
SECONDS_PER_TOKEN = 0.0005
SLOW_STEPS = f"""
import time
from octavo.backends.cpu.backend import CpuBackend
step = CpuBackend.step
def slow(self, batch):
    time.sleep({SECONDS_PER_TOKEN} * len(batch.tokens))
    return step(self, batch)
CpuBackend.step = slow
"""


@pytest.fixture(scope="module")
def start(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RemoteEngine]]:
    """Start engines that share a secret; `start.secret` names it."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "sitecustomize.py").write_text(SLOW_STEPS)
    (folder / "secret").write_text(secrets.token_hex(32))
    with contextlib.ExitStack() as stack:

        def start(*flags: str, **options: Any) -> RemoteEngine:
            flags = ("--secret-file", str(folder / "secret"), *flags)
            return stack.enter_context(RemoteEngine(tiny_llama, *flags, PYTHONPATH=str(folder), **options))

        start.secret = str(folder / "secret")  # type: ignore[attr-defined]
        yield start


@pytest.fixture(scope="module")
def fleet(start: Callable[..., RemoteEngine]) -> dict[str, RemoteEngine]:
    """One engine of each role, for tests that leave them as they are, or restart what computes."""
    engines = {role: start("--role", role) for role in ("prefill", "decode", "both")}
    return {role: engine.until_ready() for role, engine in engines.items()}


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[str]:
    """The texts of a single engine that has nothing cached."""
    with ServerProcess(tiny_llama, "--access-log", "none", "--no-enable-prefix-caching") as server:
        return asyncio.run(read_all(server.url))


@contextlib.contextmanager
def frontend(start: Any, *engines: RemoteEngine) -> Iterator[httpx.Client]:
    urls = ",".join(engine.url for engine in engines)
    flags = ("--engines", urls, "--secret-file", start.secret, "--access-log", "none")
    with ServerProcess(None, *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        until(lambda: sum(each["is_ready"] for each in replicas(http).values()) == len(engines))
        yield http


def replicas(http: httpx.Client) -> dict[str, Any]:
    """The statistics of each engine that is ready, by its role; of those of one role, the last one's."""
    found = list[dict[str, Any]]()

    def all_answer() -> bool:
        [model] = http.get("/stats").json()["models"]
        found[:] = model.get("replicas", [])
        return all(replica["engine"] is not None for replica in found if replica["is_ready"])

    until(all_answer)
    return {replica["role"]: replica for replica in found if replica["is_ready"]}


def body(i: int) -> dict[str, Any]:
    words = [f"{word} {i}" for word in ("once", "upon", "a", "time")] * (PROMPT // 16)
    options = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 1.0, "seed": i, "stream": True}
    return {"model": "tiny", "prompt": f"{i} {' '.join(words)}"[:PROMPT], "cache_salt": secrets.token_hex(4), **options}


async def read(http: httpx.AsyncClient, i: int, begun: set[int]) -> str:
    text = ""
    async with http.stream("POST", "/v1/completions", json=body(i)) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                text += event["choices"][0]["text"]
                begun.add(i)
    return text


async def read_all(url: str, disturb: Callable[[], None] | None = None, after: int = 1) -> list[str]:
    """The texts of STREAMS streams, disturbed when `after` of them have begun. No prompt is in a cache."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as http, asyncio.timeout(60):
        begun = set[int]()
        tasks = [asyncio.ensure_future(read(http, i, begun)) for i in range(STREAMS)]
        if disturb is not None:
            while len(begun) < after:
                await asyncio.sleep(0.001)
            disturb()
        return await asyncio.gather(*tasks)


def grown(after: dict[str, Any], before: dict[str, Any], role: str) -> dict[str, int]:
    """What the counters of an engine have grown by."""
    now, then = after[role]["engine"], before[role]["engine"]
    counts = {name: now[name] - then[name] for name in ("tokens_computed", "tokens_generated")}
    return {**counts, "fetched": now["tiers"]["peers"]["hits"] - then["tiers"]["peers"]["hits"]}


def test_prompts_are_computed_on_one_engine_and_go_on_on_another(
    start: Any, fleet: dict[str, RemoteEngine], expected: list[str]
) -> None:
    with frontend(start, fleet["prefill"], fleet["decode"]) as http:
        before = replicas(http)
        assert asyncio.run(read_all(str(http.base_url))) == expected
        after = replicas(http)
        prefill, decode = grown(after, before, "prefill"), grown(after, before, "decode")
        assert prefill["tokens_generated"] < STREAMS * TOKENS / 4 < decode["tokens_generated"]
        assert decode["fetched"] > 0 and prefill["fetched"] == 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.exhaustive)])
def test_an_engine_that_is_lost_while_pages_move(
    start: Any, fleet: dict[str, RemoteEngine], expected: list[str], role: str, number: signal.Signals
) -> None:
    """Nothing is lost or repeated, whichever one it is; the host kills and replaces one that is suspended."""
    with frontend(start, *fleet.values()) as http:
        child = fleet[role].child()
        assert asyncio.run(read_all(str(http.base_url), lambda: os.kill(child, number))) == expected
        until(lambda: len([each for each in replicas(http).values() if each["is_ready"]]) == 3)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_where_one_role_is_missing_the_other_does_both(
    start: Any, fleet: dict[str, RemoteEngine], expected: list[str], role: str
) -> None:
    with frontend(start, fleet[role]) as http:
        assert asyncio.run(read_all(str(http.base_url))) == expected


def test_requests_of_a_drained_engine_take_their_pages_along(
    start: Any, fleet: dict[str, RemoteEngine], expected: list[str]
) -> None:
    leaving = start("--role", "decode").until_ready()
    with frontend(start, leaving, fleet["both"]) as http:
        before = replicas(http)
        assert asyncio.run(read_all(str(http.base_url), leaving.process.terminate, STREAMS)) == expected
        until(lambda: "decode" not in replicas(http))
        assert grown(replicas(http), before, "both")["fetched"] > 0
    assert leaving.process.wait(timeout=10) == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["engine", "--role", "prefil"], "role must be prefill, decode or both, not 'prefil'"),
        (["engine", "--role", "decode"], "role needs the shared secret, with which engines fetch pages: give"),
        (["engine", "--role", "decode", "--no-enable-prefix-caching"], "enable_prefix_caching must be on with a role"),
        (["serve", "--role", "prefill"], "role is for octavo engine: each engine of octavo serve does both"),
    ],
)
def test_bad_input_is_one_line(tiny_llama: Path, command: list[str], message: str) -> None:
    done = subprocess.run([*COMMAND, command[0], str(tiny_llama), *command[1:]], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and message in done.stderr
