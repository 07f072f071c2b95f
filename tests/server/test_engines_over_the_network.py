"""Frontends and engines in processes of their own, over TCP: nobody's request is lost, whichever process ends."""

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import hostile_policy
from engine_process import COMMAND, RemoteEngine
from fleet_server import until
from octavo.address import Address
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.network.discovery import find_model
from octavo.network.run import run_engine
from server_process import ServerProcess, free_port

STREAMS = 20


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("secret") / "secret"
    file.write_text(secrets.token_hex(32))
    return str(file)


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, secret: str) -> Iterator[list[RemoteEngine]]:
    """Two engines, for tests that leave them as they are."""
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(RemoteEngine(tiny_llama, "--secret-file", secret)) for _ in range(2)]
        yield [engine.until_ready() for engine in engines]


def frontend(engines: list[str], secret: str | None, *flags: str, **environment: str) -> ServerProcess:
    shared = ["--secret-file", secret] if secret else []
    return ServerProcess(None, "--engines", ",".join(engines), *shared, "--access-log", "none", *flags, **environment)


def body(i: int, **options: Any) -> dict[str, Any]:
    common = {"model": "tiny", "prompt": f"Once {i} upon", "max_tokens": 150, "ignore_eos": True, "stream": True}
    return {**common, "temperature": 1.0, "seed": i, **options}


async def read(http: httpx.AsyncClient, request: dict[str, Any], begun: asyncio.Event | None = None) -> str:
    text = ""
    async with http.stream("POST", "/v1/completions", json=request) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                text += event["choices"][0]["text"]
                if begun is not None:
                    begun.set()
    return text


async def read_all(url: str, disturb: Any = None, times: int = 1) -> list[str]:
    """The texts of STREAMS streams, `times` one after the other in each, disturbed when the first has begun."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as http, asyncio.timeout(60):
        begun = asyncio.Event()

        async def client(i: int) -> list[str]:
            return [await read(http, body(i * times + j), begun) for j in range(times)]

        tasks = [asyncio.ensure_future(client(i)) for i in range(STREAMS)]
        if disturb is not None:
            await begun.wait()
            disturb()
        return [text for texts in await asyncio.gather(*tasks) for text in texts]


def stats(url: str) -> dict[str, Any]:
    [model] = httpx.get(f"{url}/stats").json()["models"]
    return dict(model)


def until_engines(url: str, count: int) -> None:
    until(lambda: sum(replica["is_ready"] for replica in stats(url).get("replicas", [])) == count)


def test_a_frontend_needs_nothing_but_addresses(pair: list[RemoteEngine], secret: str, tiny_llama: Path) -> None:
    """It answers as a server with an engine of its own."""
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "seed": 3}
    answers = []
    for server in (frontend([each.url for each in pair], secret), ServerProcess(tiny_llama, "--access-log", "none")):
        with server, httpx.Client(base_url=server.url, timeout=60) as http:
            completion = http.post("/v1/completions", json=body(1, stream=False, logprobs=2)).json()
            reply = http.post("/v1/chat/completions", json=chat).json()
            embedding = http.post("/v1/embeddings", json={"model": "tiny", "input": "One"}).json()
            answers.append((completion["choices"], reply["choices"], embedding["data"], reply["system_fingerprint"]))
    assert answers[0] == answers[1]


def test_kills_and_suspensions_under_streams(tiny_llama: Path, secret: str) -> None:
    """Of what listens, and of the process that computes."""
    flags = ("--secret-file", secret)
    with contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(RemoteEngine(tiny_llama, *flags)) for _ in range(3))
        server = stack.enter_context(frontend([engine.url for engine in (first, second, third)], secret))
        until_engines(server.url, 3)
        expected = asyncio.run(read_all(server.url, times=2))

        def disturb() -> None:
            first.process.kill()
            second.process.send_signal(signal.SIGSTOP)

        assert asyncio.run(read_all(server.url, disturb, times=2)) == expected
        second.process.send_signal(signal.SIGCONT)
        stack.enter_context(RemoteEngine(tiny_llama, *flags, url=first.url))
        until_engines(server.url, 3)
        texts = asyncio.run(read_all(server.url, lambda: os.kill(third.child(), signal.SIGKILL)))
        assert texts == expected[:STREAMS]
        until(lambda: "killed by SIGKILL" in third.stderr())
        until_engines(server.url, 3)


def test_a_drained_engine_is_empty_soon(tiny_llama: Path, secret: str, pair: list[RemoteEngine]) -> None:
    leaving = RemoteEngine(tiny_llama, "--secret-file", secret)
    with leaving, frontend([leaving.url, pair[0].url], secret) as server:
        until_engines(server.url, 2)
        expected = asyncio.run(read_all(server.url))
        assert asyncio.run(read_all(server.url, lambda: leaving.process.send_signal(signal.SIGTERM))) == expected
        leaving.process.wait(timeout=10)
        drained = re.search(r"drained: it has 0 requests after ([\d.]+) s", leaving.stderr())
        assert drained and float(drained[1]) < 2


def test_requests_of_a_lost_frontend_are_aborted(pair: list[RemoteEngine], secret: str) -> None:
    """While another frontend's go on."""
    urls = [pair[0].url]
    with frontend(urls, secret) as other:
        lost = frontend(urls, secret)
        with contextlib.suppress(AssertionError), lost:

            async def scenario() -> None:
                limits = httpx.Limits(max_connections=None)
                async with httpx.AsyncClient(base_url=lost.url, timeout=60, limits=limits) as http:
                    long = body(0, prompt="1 2 3", max_tokens=400, n=30)
                    reading = [asyncio.ensure_future(read(http, {**long, "seed": i})) for i in range(10)]
                    while stats(other.url)["engine"]["running"] < 100:
                        await asyncio.sleep(0.01)
                    lost.process.kill()
                    for task in reading:
                        with contextlib.suppress(httpx.HTTPError):
                            await task

            asyncio.run(scenario())
            begun = time.monotonic()
            generated = stats(other.url)["engine"]["tokens_generated"]
            until(lambda: stats(other.url)["engine"]["running"] == 0)
            assert time.monotonic() - begun < 8
        assert "requests are aborted" in pair[0].stderr()
        assert stats(other.url)["engine"]["tokens_generated"] > generated
        assert len(asyncio.run(read_all(other.url))) == STREAMS


def test_an_engine_may_come_after_its_frontend(tiny_llama: Path, secret: str) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    with frontend([url], secret) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        ready = http.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["reason"].endswith(f"waits for an engine: {url} does not answer")
        with RemoteEngine(tiny_llama, "--secret-file", secret, url=url) as engine:
            until(lambda: http.get("/ready").status_code == 200)
            assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"
            assert http.post("/v1/completions", json=body(1, stream=False)).status_code == 200
            engine.process.kill()
            until(lambda: http.get("/ready").status_code == 503)
            assert "does not answer" in http.get("/ready").text or "closed" in http.get("/ready").text


def test_a_request_that_crashes_engines_fails_alone(tiny_llama: Path, secret: str) -> None:
    """After its second crash, whichever frontends have requests in the same steps; the other engine lives on."""
    flags = ("--secret-file", secret, "--scheduling-policy", "hostile_policy:Segfault")
    path = str(Path(hostile_policy.__file__).parent)
    poison = {"model": "tiny", "prompt": hostile_policy.POISON, "max_tokens": 20}
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(RemoteEngine(tiny_llama, *flags, PYTHONPATH=path)) for _ in range(2)]
        urls = [engine.until_ready().url for engine in engines]
        ours, others = (stack.enter_context(frontend(urls, secret)) for _ in range(2))
        for server in (ours, others):
            until_engines(server.url, 2)

        async def scenario() -> tuple[list[list[str]], httpx.Response]:
            async with httpx.AsyncClient(base_url=ours.url, timeout=60) as http:
                tasks = [read_all(server.url, times=2) for server in (ours, others)]
                *texts, failed = await asyncio.gather(*tasks, http.post("/v1/completions", json=poison))
                return texts, failed

        expected = asyncio.run(read_all(ours.url, times=2))
        texts, failed = asyncio.run(scenario())
        assert texts == [expected, expected]
        assert failed.status_code == 500 and "failed 2 times while it served this request" in failed.text
        crashes = [engine.stderr().count("ended unexpectedly (killed by SIGSEGV)") for engine in engines]
        assert sorted(crashes) == [0, 2], crashes


def test_bad_input_is_one_line(pair: list[RemoteEngine], secret: str, tmp_path: Path, tiny_llama: Path) -> None:
    other = tmp_path / "other"
    other.write_text(secrets.token_hex(32))
    url = pair[0].url
    command = [*COMMAND, "serve", "--port", "0", "--engines", url, "--secret-file", str(other)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"octavo: {url} refuses the connection: it has another secret (--secret-file), or ")
    assert done.stderr.count("\n") == 1
    until(lambda: "a connection was refused" in pair[0].stderr())
    with pytest.raises(ConfigError, match=re.escape("wants a secret (--secret-file)")):
        find_model([Address.of(url)], None)
    done = subprocess.run([*COMMAND, "serve", "a-model", "--engines", url], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "leave the model out" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("listen", "settings", "message"),
    [
        ("tcp://0.0.0.0:7999", {}, "can be reached from other machines: give the shared secret"),
        ("tcp://*:7999", {"secret_file": "absent"}, "secret_file: cannot read absent"),
        ("0.0.0.0:7999", {}, "is no address of an engine"),
        ("tcp://192.0.2.1:7999", {"secret_file": "SECRET"}, "cannot listen on tcp://192.0.2.1:7999"),
        ("TAKEN", {"secret_file": "SECRET"}, "on 127.0.0.1 is in use: stop the program that uses it"),
        ("tcp://127.0.0.1:7999", {"data_parallel_size": 2}, "start one octavo engine for each"),
        ("tcp://127.0.0.1:7999", {"engines": ["tcp://a:1"]}, "engines is for octavo serve"),
        ("tcp://127.0.0.1:7999", {"kv_events": "tcp://*:5557"}, "kv_events is for octavo serve"),
    ],
)
def test_where_an_engine_does_not_start(
    pair: list[RemoteEngine], secret: str, tiny_llama: Path, listen: str, settings: dict[str, Any], message: str
) -> None:
    settings = {name: secret if value == "SECRET" else value for name, value in settings.items()}
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_engine(EngineConfig(model=str(tiny_llama), **settings), pair[0].url if listen == "TAKEN" else listen)


def test_an_engine_of_another_model_is_not_used(
    pair: list[RemoteEngine], secret: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Neither one with other files nor one with another fingerprint."""
    files = shutil.copytree(tiny_llama, tmp_path / "files")
    (files / "generation_config.json").write_text(json.dumps({"temperature": 0.3}))
    flags = ("--secret-file", secret)
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(RemoteEngine(files, *flags))
        two = stack.enter_context(RemoteEngine(tiny_llama, *flags, "--kv-cache-page-size", "64"))
        server = stack.enter_context(frontend([pair[0].url, one.url, two.url], secret))
        reasons = ("serves another model", "so its tokens might too")
        until(lambda: all(reason in server.stderr() for reason in reasons))
        assert sorted(replica["is_ready"] for replica in stats(server.url)["replicas"]) == [False, False, True]
        assert len(asyncio.run(read_all(server.url))) == STREAMS
