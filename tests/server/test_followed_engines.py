"""Engines that join and leave while a frontend follows a host name, or is told other addresses."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_process import RemoteEngine
from fleet_server import ADMIN, FleetServer, until
from octavo import AsyncLLM, SamplingParams
from octavo.network import followed
from octavo.network.names import MISSES
from server_process import free_port

LONG = SamplingParams(seed=1, max_tokens=300, ignore_eos=True)


async def until_names(llm: AsyncLLM, *hosts: str) -> None:
    """Until exactly the engines on these hosts are ready."""
    while True:
        ready = sorted(replica.name for replica in await llm.replica_stats() if replica.is_ready)
        if [name.split()[1].partition(":")[0] for name in ready] == sorted(hosts):
            return
        await asyncio.sleep(0.01)


def test_a_host_name_is_followed(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it stands for joins and leaves; while nobody knows it, nothing changes. Other addresses work the same."""
    monkeypatch.setattr(followed, "LOOK", 0.05)
    port, numbers, failures = free_port(), ["127.0.0.1"], 0
    look_up = socket.getaddrinfo

    def answer(host: str, *rest: Any, **options: Any) -> list[Any]:
        nonlocal failures
        if host != "engines.test":
            return look_up(host, *rest, **options)
        if not numbers:
            failures += 1
            raise socket.gaierror("nobody knows")
        return [entry for number in numbers for entry in look_up(number, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)

    async def scenario(llm: AsyncLLM) -> None:
        [alone] = await llm.agenerate(["Once"], LONG)
        await until_names(llm, "127.0.0.1")
        numbers.append("127.0.0.2")
        await until_names(llm, "127.0.0.1", "127.0.0.2")
        running = asyncio.ensure_future(llm.agenerate(["Once"] * 8, LONG))
        while not any(load.completions for address, load in llm.engine_loads().items() if "127.0.0.1" in address):
            await asyncio.sleep(0.01)
        numbers.remove("127.0.0.1")
        await until_names(llm, "127.0.0.2")
        assert {tuple(output.outputs[0].token_ids) for output in await running} == {tuple(alone.outputs[0].token_ids)}
        numbers.clear()
        while failures < 2 * MISSES:
            await asyncio.sleep(0.01)
        await until_names(llm, "127.0.0.2")
        llm.set_engines([f"tcp://127.0.0.1:{port}"])
        await until_names(llm, "127.0.0.1")
        assert (await llm.agenerate(["Once"], LONG))[0].outputs[0].token_ids == alone.outputs[0].token_ids

    one, two = (RemoteEngine(tiny_llama, url=f"tcp://{host}:{port}") for host in ("127.0.0.1", "127.0.0.2"))
    with one, two:
        one.until_ready()
        two.until_ready()
        run(scenario, f"tcp://engines.test:{port}")


def run(scenario: Callable[[AsyncLLM], Awaitable[None]], *engines: str) -> None:
    async def main() -> None:
        async with AsyncLLM(engines=list(engines)) as llm, asyncio.timeout(60):
            await scenario(llm)

    asyncio.run(main())


def test_a_model_of_a_fleet_may_have_such_engines(tiny_llama: Path, tmp_path: Path) -> None:
    """It is unloaded and loaded, and swapped for engines at other addresses, beside a model with its own engine."""
    with RemoteEngine(tiny_llama) as one, RemoteEngine(tiny_llama) as two:
        models = {"far": {"engines": [one.url], "aliases": ["alias"]}, "near": str(tiny_llama)}
        with FleetServer(tmp_path, {"models": models, "memory": "4GiB"}) as server:
            until(lambda: server.state("far") == "loaded")
            text = server.complete("alias").json()["choices"][0]["text"]
            assert server.complete("near").json()["choices"][0]["text"] == text
            assert server.change("unload", "far").status_code == 200
            assert server.complete("far").status_code == 503
            assert server.change("load", "far").status_code == 200
            assert server.complete("far").json()["choices"][0]["text"] == text
            two.until_ready()
            swapped = server.change("swap", "far", model="far", settings={"engines": [two.url]})
            assert swapped.status_code == 200, swapped.text
            assert server.complete("alias").json()["choices"][0]["text"] == text
            for replicas in (1, 2):
                scaled = server.change("scale", "far", replicas=replicas)
                assert scaled.status_code == 400 and "engine" in scaled.text
            models = {
                entry["name"]: entry for entry in httpx.get(f"{server.url}/stats", headers=ADMIN).json()["models"]
            }
            assert models["far"]["memory"] == 0 < models["near"]["memory"]
