"""AsyncLLM: an engine in a process of its own, which may be killed at any time without a request being lost."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from octavo import AsyncLLM, RequestOutput, SamplingParams
from octavo.errors import DamagedWeights, InvalidRequest, OutOfMemory, PromptTooLong
from octavo.frontend.requests import make_request

SEEDED = SamplingParams(seed=1, max_tokens=30, ignore_eos=True)
LONG = SamplingParams(seed=1, max_tokens=400, ignore_eos=True)


def run(model: Path, scenario: Callable[[AsyncLLM], Awaitable[None]], **settings: object) -> None:
    async def main() -> None:
        async with AsyncLLM(str(model), **settings) as llm:
            await asyncio.wait_for(scenario(llm), 100)

    asyncio.run(main())


async def collect(llm: AsyncLLM, prompt: str, params: SamplingParams) -> tuple[str, list[int]]:
    text, tokens = "", []
    async for increment in llm.generate(prompt, params):
        text += increment.outputs[0].text
        tokens += increment.outputs[0].token_ids
    return text, tokens


def test_increments_make_the_whole(tiny_llama):
    async def scenario(llm: AsyncLLM) -> None:
        (whole,) = await llm.agenerate("The class", SEEDED)
        text, tokens = await collect(llm, "The class", SEEDED)
        assert (text, tokens) == (whole.text, whole.outputs[0].token_ids)
        both = await llm.agenerate(["The class", "A list"], [SEEDED, LONG])
        assert both[0].text == text and len(both[1].outputs[0].token_ids) == 400

    run(tiny_llama, scenario)


def test_increments_of_many_and_of_a_slow_reader(tiny_llama):
    async def scenario(llm: AsyncLLM) -> None:
        prompts = ["The class", "A list"]
        whole = await llm.agenerate(prompts, [SEEDED, LONG])
        tokens: list[list[int]] = [[], []]
        rounds = 0
        async for increments in llm.stream_requests([make_request("The class", SEEDED), make_request("A list", LONG)]):
            rounds += 1
            for prompt, increment in increments:
                tokens[prompt] += increment.outputs[0].token_ids
            if rounds == 1:
                while (await llm.stats()).running:  # read nothing till all is computed
                    pass
        assert tokens == [output.outputs[0].token_ids for output in whole]
        assert rounds == 2

    run(tiny_llama, scenario)


def test_an_abandoned_request_is_aborted(tiny_llama):
    async def scenario(llm: AsyncLLM) -> None:
        iterator = llm.generate("a", LONG)
        await anext(iterator)
        await iterator.aclose()
        stats = await llm.stats()  # asked after the abort, on the same socket
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.free_pages + stats.cached_pages == stats.num_pages

    run(tiny_llama, scenario)


def test_an_aborted_request_ends(tiny_llama):
    async def scenario(llm: AsyncLLM) -> None:
        last: RequestOutput | None = None
        async for increment in llm.generate("a", LONG, request_id="mine"):
            if last is None:
                await llm.abort("mine")
            last = increment
        assert last is not None and last.finished and last.outputs[0].finish_reason == "abort"

    run(tiny_llama, scenario)


def test_a_killed_engine_loses_nothing(tiny_llama):
    prompts = ["The class", "A list", "An int"]

    async def scenario(llm: AsyncLLM) -> None:
        params = SamplingParams(seed=1, max_tokens=300, ignore_eos=True)
        undisturbed = [await collect(llm, prompt, params) for prompt in prompts]
        under_way = asyncio.Event()

        async def watched(prompt: str) -> tuple[str, list[int]]:
            text, tokens = "", []
            async for increment in llm.generate(prompt, params):
                text += increment.outputs[0].text
                tokens += increment.outputs[0].token_ids
                if len(tokens) == 20:
                    under_way.set()
            return text, tokens

        async def kill() -> None:
            await under_way.wait()
            os.kill(llm._frontend.replicas[0].link.pid, signal.SIGKILL)

        *disturbed, _ = await asyncio.gather(*map(watched, prompts), kill())
        assert disturbed == undisturbed
        assert llm.readiness()[0]

    run(tiny_llama, scenario)


def test_an_engine_that_is_killed_again_and_again_loses_nothing(tiny_llama):
    async def scenario(llm: AsyncLLM) -> None:
        (undisturbed,) = await llm.agenerate("a", SEEDED)
        killed: set[int] = set()
        tokens: list[int] = []
        async for increment in llm.generate("a", SEEDED):
            tokens += increment.outputs[0].token_ids
            pid = llm._frontend.replicas[0].link.pid
            if len(killed) < 5 and pid not in killed:
                killed.add(pid)
                with contextlib.suppress(ProcessLookupError):  # a token that came before its end
                    os.kill(pid, signal.SIGKILL)
        assert tokens == undisturbed.outputs[0].token_ids and len(killed) == 5

    run(tiny_llama, scenario)


def test_bad_requests_harm_nobody(tiny_llama):
    async def scenario(llm: AsyncLLM) -> None:
        good = asyncio.create_task(llm.agenerate("a", LONG))
        for prompt, error in (("", InvalidRequest), ([9] * 600, PromptTooLong), ([512], InvalidRequest)):
            with pytest.raises(error):
                await llm.agenerate(prompt)
        with pytest.raises(InvalidRequest, match="stop_token_ids has token ids beyond the vocabulary of 512"):
            await llm.agenerate("a", SamplingParams(stop_token_ids=[512]))
        (output,) = await good
        assert len(output.outputs[0].token_ids) == 400

    run(tiny_llama, scenario)


def test_the_engine_ends_with_its_frontend(tiny_llama):
    async def scenario(llm: AsyncLLM) -> None:
        pids.append(llm._frontend.replicas[0].link.pid)

    pids: list[int] = []
    run(tiny_llama, scenario)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_what_loading_raises_reaches_the_caller(tiny_llama, tmp_path):
    async def start(model: Path, **settings: object) -> None:
        llm = AsyncLLM(str(model), **settings)
        await llm.start()

    with pytest.raises(OutOfMemory, match="set kv_cache_memory to at least"):
        asyncio.run(start(tiny_llama, kv_cache_memory=1))
    for file in tiny_llama.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(DamagedWeights):
        asyncio.run(start(tmp_path))
