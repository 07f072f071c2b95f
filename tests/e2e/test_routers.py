"""sglang-router and vllm-router, the real ones, in front of two servers, one of which is killed."""

import asyncio
import importlib.util
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from server_process import ServerProcess

# power_of_two queries the servers' load, and kv_aware the tokens of prompts.
ROUTERS = {"sglang_router": "power_of_two", "vllm_router": "kv_aware"}
REQUESTS = 20  # of each kind


class Router(NamedTuple):
    url: str
    log: Path


@pytest.fixture(scope="module")
def survivor(tiny_llama: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tiny_llama) as server:
        yield server


@pytest.fixture
def victim(tiny_llama: Path) -> Iterator[ServerProcess]:
    """A server that the test kills."""
    server = ServerProcess(tiny_llama)
    with server.process:
        try:
            yield server.__enter__()
        finally:
            server.process.kill()


@pytest.mark.parametrize("module", ROUTERS)
def test_a_router_in_front_of_two_servers(module: str, survivor: ServerProcess, victim: ServerProcess) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    assert instance(survivor) == instance(survivor) != instance(victim)
    expected = asyncio.run(answers(survivor.url))
    before = tokens_generated(survivor)
    with router(module, survivor, victim) as front:
        models = httpx.get(f"{front.url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["tiny"]
        assert asyncio.run(answers(front.url)) == expected
        assert tokens_generated(survivor) > before
        assert tokens_generated(victim) > 0
        if module == "sglang_router":
            loads = httpx.get(f"{front.url}/get_loads").json()["workers"]
            assert all(worker["load"] >= 0 for worker in loads)  # -1: unknown
        else:
            assert "render_unavailable" not in front.log.read_text()

        victim.process.kill()
        victim.process.wait()
        assert asyncio.run(answers(front.url)) == expected


@pytest.mark.skipif(importlib.util.find_spec("vllm_router") is None, reason="vllm_router is not installed")
def test_vllm_router_follows_the_pages_that_servers_publish(tiny_llama: Path) -> None:
    endpoints = [f"tcp://127.0.0.1:{port}" for port in free_ports(2)]
    prompts = [" ".join(f"word{i} {j}" for j in range(30)) for i in range(6)]
    with ExitStack() as stack:
        servers = [stack.enter_context(ServerProcess(tiny_llama, "--kv-events", each)) for each in endpoints]
        flags = [f"--kv-event-source={server.url}={each}" for server, each in zip(servers, endpoints, strict=True)]
        flags += ["--kv-event-block-size", "32", "--kv-event-model", "tiny"]
        front = stack.enter_context(router("vllm_router", *servers, flags=flags))

        def cached(url: str, prompt: str) -> int:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
            usage = httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

        # An event that is published before the router has subscribed is lost, so try again with other prompts.
        deadline = time.monotonic() + 30
        for attempt in range(1000):
            assert time.monotonic() < deadline
            for i, prompt in enumerate(prompts):  # each server has computed half of the prompts
                cached(servers[i % 2].url, f"{attempt} {prompt}")
            time.sleep(0.1)
            hits = [cached(front.url, f"{attempt} {prompt} and more") for prompt in prompts]
            if all(hit >= 32 for hit in hits):
                break


async def answers(url: str) -> list[Any]:
    """The answers to chats and completions, with and without streaming, sent at once."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def complete(kind: Any, prompt: dict[str, Any], stream: bool) -> tuple[str, str]:
            options = {"model": "tiny", "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
            reply = await kind.create(**prompt, **options, stream=stream)
            chunks = [chunk async for chunk in reply] if stream else [reply]
            choices = [choice for chunk in chunks for choice in chunk.choices]
            if kind is client.completions:
                texts = [choice.text for choice in choices]
            else:
                texts = [(choice.delta if stream else choice.message).content or "" for choice in choices]
            return "".join(texts), choices[-1].finish_reason

        chats = [{"messages": [{"role": "user", "content": f"Describe module {i}"}]} for i in range(REQUESTS)]
        prompts = [{"prompt": f"The module {i}"} for i in range(REQUESTS)]
        return await asyncio.gather(
            *(complete(client.chat.completions, chat, i % 4 != 0) for i, chat in enumerate(chats)),
            *(complete(client.completions, prompt, i % 4 != 0) for i, prompt in enumerate(prompts)),
        )


def instance(server: ServerProcess) -> str:
    return httpx.get(f"{server.url}/server_info").json()["instance_id"]


def tokens_generated(server: ServerProcess) -> int:
    return httpx.get(f"{server.url}/stats").json()["models"][0]["engine"]["tokens_generated"]


@contextmanager
def router(module: str, *servers: ServerProcess, flags: Sequence[str] = ()) -> Iterator[Router]:
    """A router that has found all servers."""
    port, metrics_port = free_ports(2)
    urls = [server.url for server in servers]
    command = [sys.executable, "-m", f"{module}.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port), "--log-level", "debug"]
    command += ["--policy", ROUTERS[module], "--health-check-endpoint", "/ready", *flags, "--worker-urls", *urls]
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.NamedTemporaryFile())
        process = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
        stack.callback(process.kill)
        started = Router(f"http://127.0.0.1:{port}", Path(log.name))
        deadline = time.monotonic() + 60
        while not workers_found(started, len(servers)):
            assert process.poll() is None and time.monotonic() < deadline, started.log.read_text()
            time.sleep(0.05)
        yield started


def workers_found(front: Router, number: int) -> bool:
    try:
        ready = httpx.get(f"{front.url}/readiness").is_success
        return ready and len(httpx.get(f"{front.url}/workers").json()["workers"]) == number
    except httpx.TransportError:
        return False


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in sockets]
