"""Engines that share pages through a real Redis, which dies, fills up, slows down, forgets and lies."""

import logging
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.kv.store.redis import TIMEOUT, RedisStore
from redis_process import RedisServer, redis_server
from server_process import free_port
from slow_proxy import SlowProxy, slow_proxy
from store_client import FULL, PAGE, PROMPT, STALL, StoreClient

LONG = [(7 * i) % 500 + 3 for i in range(200)]
FULL_PAGES = 192  # tokens of LONG in full pages


def connect(url: str) -> StoreClient:
    return StoreClient(RedisStore(EngineConfig(kv_store=url)))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def generate(model: Path, **settings: Any) -> tuple[list[int], int]:
    """The tokens of LONG, and how many of its prompt were not computed, by an engine of its own."""
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=20, ignore_eos=True)
    with LLM(str(model), max_model_len=256, kv_cache_memory="8MiB", **settings) as llm:
        [output] = llm.generate([LONG], params, use_tqdm=False)
    return output.outputs[0].token_ids, output.metrics.cached_tokens


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "int8"}, {"kv_key": True}, {"kv_disk": True}])
def test_a_prompt_computed_on_one_engine_answers_on_another(
    tiny_llama: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    alone = {name: value for name, value in settings.items() if name == "kv_cache_dtype"}
    expected, _ = generate(tiny_llama, **alone)
    if "kv_key" in settings:
        (tmp_path / "key").write_text("0f" * 32)
        settings = {"kv_key": str(tmp_path / "key")}
    with redis_server() as server:
        for found in (0, FULL_PAGES):
            if "kv_disk" in settings:
                settings = {"kv_disk": str(tmp_path / str(found))}
            assert generate(tiny_llama, kv_store=server.url, **settings) == (expected, found)
        if "kv_key" in settings:
            assert generate(tiny_llama, kv_store=server.url) == (expected, 0)
        ttl = redis.Redis(port=server.port).ttl(next(redis.Redis(port=server.port).scan_iter()))
        assert 86_000 < ttl <= 86_400


class Fault:
    """Something that happens to a Redis, and ends."""

    def __init__(self, kind: str, server: RedisServer, proxy: SlowProxy):
        self.kind, self.server, self.proxy = kind, server, proxy
        self.redis = redis.Redis(port=server.port)

    def begin(self) -> None:
        match self.kind:
            case "killed":
                self.server.signal(signal.SIGKILL)
            case "suspended":
                self.server.signal(signal.SIGSTOP)
            case "full":
                self.redis.config_set("maxmemory", "1")
            case "evicting":
                self.redis.mset({f"other {number}": bytes(10_000) for number in range(300)})
                self.redis.config_set("maxmemory-policy", "allkeys-random")
                self.redis.config_set("maxmemory", self.redis.info("memory")["used_memory"] - 1_000_000)
            case "paused":
                self.redis.client_pause(1000)
            case "slow":
                self.proxy.delay = 1.0
            case "flushed":
                self.redis.flushall()
            case "corrupted":
                for name in self.redis.scan_iter():
                    value = bytearray(self.redis.get(name) or b"")
                    value[random.randrange(len(value))] ^= 1
                    self.redis.set(name, bytes(value))
            case "read-only":
                self.redis.replicaof("127.0.0.1", "1")

    def end(self) -> None:
        self.proxy.delay = 0.0
        match self.kind:
            case "killed":
                self.server.stop()
                self.server.start()
            case "suspended":
                self.server.signal(signal.SIGCONT)
            case "full" | "evicting":
                self.redis.config_set("maxmemory", "0")
            case "paused":
                self.redis.client_unpause()
            case "read-only":
                self.redis.replicaof("NO", "ONE")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[RedisServer, SlowProxy]]:
    with redis_server() as server, slow_proxy(server.port) as proxy:
        yield server, proxy


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        *[("killed", 2), ("suspended", 2), ("paused", 2), ("slow", 2)],  # that it is lost, and that it is back
        *[("full", 1), ("read-only", 1), ("evicting", 0), ("flushed", 0), ("corrupted", 0)],
    ],
)
def test_a_store_that_fails_under_load(
    served: tuple[RedisServer, SlowProxy], kind: str, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Two engines answer prompts that begin alike. Every token is checked by `ask`, whatever happens to the store."""
    server, proxy = served
    fault, rng = Fault(kind, server, proxy), random.Random(kind)
    engines = [connect(f"redis://127.0.0.1:{proxy.port}") for _ in range(2)]
    beginnings = [rng.choices(range(3), k=20) for _ in range(3)]

    def ask(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            rng.choice(engines).ask(rng.choice(beginnings) + rng.choices(range(3), k=rng.randrange(1, 30)))
            time.sleep(0.002)

    ask(0.3)
    fault.begin()
    ask(0.8)
    fault.end()
    ask(0.3)
    deadline, found = time.monotonic() + 12, 0
    while not found and time.monotonic() < deadline:  # engines find each other's pages again
        prompt = rng.choices(range(3), k=41)
        engines[0].ask(prompt)
        engines[0].settle()
        found = engines[1].ask(prompt)
        time.sleep(0.05)
    if kind not in ("full", "read-only"):  # writes pause for longer
        assert found
    assert max(engine.longest for engine in engines) < STALL
    for engine in engines:
        engine.close()
    assert len(warnings(caplog)) <= most * len(engines)


def test_conversations_that_wander_over_engines() -> None:
    """Each turn goes to a random one of four engines, which finds the full pages of all that came before."""
    rng = random.Random(4)
    with redis_server() as server:
        engines = [connect(server.url) for _ in range(4)]
        told = [rng.choices(range(3), k=20) for _ in range(20)]
        found = known = 0
        for turn in range(4):
            for number in rng.sample(range(20), 20):
                before = len(told[number]) // PAGE * PAGE if turn else 0
                told[number] += rng.choices(range(3), k=9)
                engine = rng.choice(engines)
                found += min(engine.ask(told[number]), before)
                known += before
                engine.settle()
        for engine in engines:
            engine.close()
    assert found >= 0.95 * known


@pytest.mark.parametrize("scheme", ["redis", "unix", "rediss"])
def test_addresses_and_passwords(scheme: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "redis.sock"
    port, files = 0, ["", ""]
    options = ["--unixsocket", str(path), "--requirepass", "p@ss:/word", "--databases", "4"]
    if scheme == "rediss":
        port, files = free_port(), [str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")]
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2"]
        command += ["-nodes", "-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([*command, "-keyout", files[0], "-out", files[1]], check=True, capture_output=True)
        options += ["--tls-key-file", files[0], "--tls-cert-file", files[1], "--tls-ca-cert-file", files[1]]
        options += ["--tls-auth-clients", "no", "--tls-port", str(port)]
    with redis_server(*options) as server:
        place = {
            "redis": f"127.0.0.1:{server.port}/3",
            "unix": f"{path}?db=3",
            "rediss": f"127.0.0.1:{port}/3?ssl_ca_certs={files[1]}",
        }[scheme]
        first, second = (connect(f"{scheme}://:p%40ss%3A%2Fword@{place}") for _ in range(2))
        assert first.ask() == 0
        first.settle()
        assert second.ask() == FULL
        assert redis.Redis(port=server.port, password="p@ss:/word", db=3).dbsize() == 10
        stranger = connect(f"{scheme}://:wrong@{place}")
        wait_for_warning(caplog)
        assert stranger.ask() == 0
        assert "WRONGPASS" in warnings(caplog)[0] and "wrong@" not in warnings(caplog)[0]
        if scheme == "rediss":
            caplog.clear()
            distrusting = connect(f"rediss://:p%40ss%3A%2Fword@127.0.0.1:{port}/3")
            wait_for_warning(caplog)
            assert distrusting.ask() == 0 and "certificate" in warnings(caplog)[0].lower()
            distrusting.close()
        for client in (first, second, stranger):
            client.close()


def test_a_page_over_a_slow_line_is_written_while_it_makes_progress() -> None:
    with redis_server() as server, slow_proxy(server.port) as proxy:
        store = RedisStore(EngineConfig(kv_store=f"redis://127.0.0.1:{proxy.port}"))
        proxy.rate = 2e6
        value = random.Random(3).randbytes(4_000_000)
        began = time.monotonic()
        store.set("page", memoryview(value), 60)
        assert time.monotonic() - began > 1.5 * TIMEOUT
        assert redis.Redis(port=server.port).get("page") == value
        proxy.rate = 1.0
        with pytest.raises(TimeoutError):
            store.set("page", memoryview(value), 60)
        store.close()


def test_something_else_listens_there(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = connect(f"redis://127.0.0.1:{listener.getsockname()[1]}")
        for _ in range(3):
            connection, _ = listener.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 400)
            client.ask(PROMPT)
            connection.close()
        assert client.longest < STALL
        assert warnings(caplog) == [
            f"kv_store: redis://127.0.0.1:{listener.getsockname()[1]} cannot be used "
            "(it does not speak the protocol of Redis); pages are computed until it can"
        ]
        client.close()


def wait_for_warning(caplog: pytest.LogCaptureFixture) -> None:
    deadline = time.monotonic() + 10
    while not warnings(caplog):
        assert time.monotonic() < deadline
        time.sleep(0.02)
