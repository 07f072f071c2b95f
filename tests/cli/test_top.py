"""octavo top against a real server, on paper and in a terminal; and the figures it is made of."""

import re
import signal
import termios
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from rich.console import Console

from command_line import Terminal, answer, complaint
from octavo.cli.top_screen import frame
from octavo.engine.engine import Engine
from octavo.engine.messages import EngineRequest, EngineStats
from octavo.kv import KVCache, Prefix
from octavo.kv.page_map import page_map
from octavo.params import SamplingParams
from octavo.server.stats import ServerStats
from prefix_backend import PrefixBackend
from server_process import ServerProcess

ENDLESS = {"prompt": ["a"] * 8, "n": 128, "max_tokens": 480, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tiny_llama, "--max-batch-size", "2", "--max-batch-tokens", "64") as server:
        yield server


def test_one_frame(server: ServerProcess) -> None:
    tenant = {"x-octavo-tenant": "alice"}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS, headers=tenant, timeout=60) as running:
        assert running.status_code == 200
        shown = answer("top", "--once", "--url", server.url)
    queue = r"[1-9]\d* of 10,000 waiting, [1-9]\d* for a fork's prefill"
    for text in (
        "tiny · fcfs",
        " 2 of 2 running",
        queue,
        "0 refused · 0 timed out",
        "[12] decode · ",
        r"tenants +alice [1-9]",
        "of 64 rows",
    ):
        assert re.search(text, shown), shown
    rates = shown[shown.index("steps") : shown.index("prefixes")]
    assert "–" not in rates and " 0 /s" not in rates


def test_stats_of_a_request(server: ServerProcess) -> None:
    def stats() -> dict[str, Any]:
        return httpx.get(f"{server.url}/stats").json()

    before = stats()["models"][0]["engine"]
    prompt = list(range(5, 105))
    for _ in range(2):
        httpx.post(f"{server.url}/v1/completions", json={"prompt": prompt, "max_tokens": 3, "ignore_eos": True})
    [after] = stats()["models"]
    grown = {name: after["engine"][name] - before[name] for name in ("prompt_tokens", "cached_tokens")}
    assert grown["prompt_tokens"] == 200
    assert 96 <= grown["cached_tokens"] < 100  # of the second one three pages, and perhaps of a fourth
    assert after["limits"]["page_size"] == 32 and after["limits"]["max_batch_tokens"] == 64
    assert after["frontend"]["live"] == 0 and after["engine"]["decode_rows"] == 0


def test_no_server(server: ServerProcess) -> None:
    assert "octavo serve" in complaint("top", "--url", "http://127.0.0.1:9")
    assert "Invalid port" in complaint("top", "--url", "nonsense:80:90")
    assert "GET /v1/stats" in complaint("top", "--url", f"{server.url}/v1")


@pytest.mark.parametrize("end", ["q", "\x03"])
def test_in_a_terminal(server: ServerProcess, end: str) -> None:
    terminal = Terminal("top", "--url", server.url)
    try:
        before = termios.tcgetattr(terminal.screen)
        terminal.wait_for("octavo top")
        terminal.type("x")
        terminal.wait_for(r"0 /s of –")  # the second look: there are rates
        terminal.type(end)
        assert terminal.process.wait(timeout=20) == 0
        assert termios.tcgetattr(terminal.screen) == before
    finally:
        terminal.close()


def test_a_server_that_goes_away_and_comes_back(tiny_llama: Path) -> None:
    with ServerProcess(tiny_llama) as server:
        terminal = Terminal("top", "--url", server.url)
        try:
            terminal.wait_for("octavo top")
            server.signal(signal.SIGTERM)
            terminal.wait_for("no server answers")
            server.wait_until_closed()
            with ServerProcess(tiny_llama, "--port", str(server.address[1])):
                terminal.type("x")
                terminal.wait_for(r"0 /s of –")
            terminal.type("q")
            assert terminal.process.wait(timeout=20) == 0
        finally:
            terminal.close()


# The screen


def look(seconds: float, **engine: Any) -> ServerStats:
    text = {"name": "m", "policy": "fair", "state": "loaded", "error": "", "aliases": [], "memory": 0}
    limits = dict.fromkeys(("max_batch_size", "max_batch_tokens", "max_queue", "max_model_len", "page_size"), 10)
    frontend = dict.fromkeys(("live", "limit", "refused", "timed_out"), 3)
    lists = {name: list[int]() for name in ("step_tokens", "preempted", "accepted")}
    numbers = dict.fromkeys(set(EngineStats.__struct_fields__) - {"page_map", "tiers", *lists}, 0)
    engine = {**numbers, **lists, "page_map": ".hcpm", **engine}
    model = {**text, "limits": limits, "frontend": frontend, "engine": engine}
    return msgspec.convert({"time": seconds, "version": "0", "models": [model]}, ServerStats)


def drawn(now: ServerStats, before: ServerStats | None) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(frame(now, before))
    return console.export_text()


def test_rates() -> None:
    before = look(100.0, steps=10, tokens_generated=100, prompt_tokens=1000, cached_tokens=100, step_seconds=1.0)
    now = look(102.0, steps=30, tokens_generated=3100, prompt_tokens=2000, cached_tokens=900, step_seconds=1.5)
    shown = drawn(now, before)
    assert "1,500 /s out" in shown and "10 /s of 25.0 ms" in shown
    assert "45% of 2,000 prompt tokens were cached, 80% in the last second" in shown
    for first, second in ((now, None), (before, now), (now, now)):  # one look; an engine that began anew; no time
        assert "– /s out" in drawn(first, second)
    assert "·█▒◆↑\n" in shown.replace(" ", "")


def test_every_width_and_size_can_be_drawn() -> None:
    for width in (1, 20, 80):
        Console(width=width, file=open("/dev/null", "w")).print(  # noqa: SIM115, PTH123
            frame(look(1.0, running=10**6, waiting=10**6, num_pages=10**6, page_map="h" * 512), None)
        )


# The page map


def test_page_map_says_what_the_pool_says() -> None:
    engine = Engine(PrefixBackend(40, 4), num_pages=40, max_model_len=100, max_batch_size=4, max_batch_tokens=64)

    def run(id: str, prompt: list[int], steps: int) -> EngineStats:
        engine.add(EngineRequest(id, prompt, SamplingParams(max_tokens=50)))
        for _ in range(steps):
            engine.step()
        return engine.stats()

    assert engine.stats().page_map == "." * 40
    stats = run("a", [1] * 20, steps=1)
    assert stats.page_map.count("h") == 5 and (stats.decode_rows, stats.prefill_rows) == (0, 20)
    stats = run("b", [2] * 7, steps=1)
    assert (stats.decode_rows, stats.prefill_rows) == (1, 7)
    engine.abort(["a"])
    engine.pin("state", [2] * 7)
    stats = engine.stats()
    counts = {state: stats.page_map.count(state) for state in ".hcp"}
    assert counts == {".": stats.free_pages, "h": 1, "c": stats.cached_pages, "p": stats.num_pinned}
    assert stats.num_pinned == 1 and stats.cached_pages == 6


def test_page_map_of_a_large_pool() -> None:
    kv = KVCache(100_000, 4)
    assert page_map(kv) == "." * 512
    held, _ = kv.allocate(Prefix(bytes(16), array("i", [1] * 4 * 50_000), 4)) or (None, 0)
    shown = page_map(kv)
    assert abs(shown.count("h") - 256) <= 1 and shown == "h" * shown.count("h") + "." * shown.count(".")
    assert held is not None
