"""Engines that crash, hang, do not load or are suspended: nobody else's request is lost, repeated or left waiting."""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import hostile_policy
from octavo import LLM, AsyncLLM, RequestOutput, SamplingParams
from octavo.config import EngineConfig
from octavo.errors import EngineDead, InvalidRequest, RequestFailed, RequestTimeout
from octavo.frontend import replica
from octavo.frontend.links import process

SHORT = SamplingParams(seed=1, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(seed=1, max_tokens=300, ignore_eos=True)
PROMPTS = ["The class", "A list", "An int", "def f(", "import "]


def run(model: Path, scenario: Callable[[AsyncLLM], Awaitable[None]], **settings: object) -> None:
    async def main() -> None:
        async with AsyncLLM(str(model), **settings) as llm, asyncio.timeout(60):
            await scenario(llm)

    asyncio.run(main())


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def engine_pid(llm: AsyncLLM) -> int:
    assert llm._frontend.replicas[0].link is not None and llm._frontend.replicas[0].link.pid is not None
    return llm._frontend.replicas[0].link.pid


async def until_ready(llm: AsyncLLM, is_ready: bool = True) -> None:
    while llm.readiness()[0] is not is_ready:
        await asyncio.sleep(0.01)


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(hostile_policy.__file__).parent))


# A1: poison


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("Crash", "exit code 139"),
        ("KillItself", "killed by SIGKILL"),
        ("Segfault", "killed by SIGSEGV"),
        ("HoldTheLock", "no message for 2.5 s"),
    ],
)
def test_a_request_that_crashes_engines_fails_alone(tiny_llama: Path, hostile: None, policy: str, reason: str) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        expected = tokens_of(await llm.agenerate(PROMPTS, LONG))
        others = asyncio.ensure_future(llm.agenerate(PROMPTS, LONG))
        await asyncio.sleep(0)
        message = f"failed 2 times while it served this request ({reason})"
        with pytest.raises(RequestFailed, match=re.escape(message)):
            await llm.agenerate(hostile_policy.POISON, LONG)
        assert tokens_of(await others) == expected
        assert llm.readiness() == (True, "the engine is ready")

    run(tiny_llama, scenario, scheduling_policy=f"hostile_policy:{policy}")


def test_two_that_crash_engines_fail_both(tiny_llama: Path, hostile: None) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        expected = tokens_of(await llm.agenerate(PROMPTS, LONG))
        *poisons, others = await asyncio.gather(
            llm.agenerate(hostile_policy.POISON, LONG),
            llm.agenerate(hostile_policy.POISON, SHORT),
            llm.agenerate(PROMPTS, LONG),
            return_exceptions=True,
        )
        assert [type(poison) for poison in poisons] == [RequestFailed] * 2
        assert not isinstance(others, BaseException) and tokens_of(others) == expected

    run(tiny_llama, scenario, scheduling_policy="hostile_policy:Crash")


def test_a_request_that_hangs_the_engine_fails_alone(
    tiny_llama: Path, hostile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "STEP_SECONDS", 1.0)

    async def scenario(llm: AsyncLLM) -> None:
        expected = tokens_of(await llm.agenerate(PROMPTS, LONG))
        others = asyncio.ensure_future(llm.agenerate(PROMPTS, LONG))
        with pytest.raises(RequestFailed, match="took longer than 1 s"):
            await llm.agenerate(hostile_policy.POISON, LONG)
        assert tokens_of(await others) == expected

    run(tiny_llama, scenario, scheduling_policy="hostile_policy:Hang")


def test_a_kill_for_memory_is_a_fault(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kills = iter(range(100))
    monkeypatch.setattr(process, "memory_kills", lambda: next(kills))

    async def scenario(llm: AsyncLLM) -> None:
        expected = tokens_of(await llm.agenerate(PROMPTS, LONG))
        running = asyncio.ensure_future(llm.agenerate(PROMPTS, LONG))
        await asyncio.sleep(0)
        os.kill(engine_pid(llm), signal.SIGKILL)
        assert tokens_of(await running) == expected
        assert "when memory had run out" in caplog.text

    run(tiny_llama, scenario)


# A2: engines that do not start again


def test_killed_while_it_loads(tiny_llama: Path) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        expected = tokens_of(await llm.agenerate(PROMPTS, LONG))
        running = asyncio.ensure_future(llm.agenerate(PROMPTS, LONG))
        await asyncio.sleep(0)
        for _ in range(3):
            pid = engine_pid(llm)
            os.kill(pid, signal.SIGKILL)
            while engine_pid(llm) == pid:
                await asyncio.sleep(0.001)
        assert tokens_of(await running) == expected

    run(tiny_llama, scenario)


def test_a_process_that_ends_before_it_is_told_what_to_load(tiny_llama: Path) -> None:
    """It was started early; what it lacks, a module perhaps, it has printed itself."""
    early = process.EngineProcess()
    early.popen.kill()
    early.popen.wait(10)
    llm = AsyncLLM.from_config(EngineConfig(model=str(tiny_llama)), early)
    with pytest.raises(EngineDead, match="ended while it was loading"):
        asyncio.run(llm.start())


def test_the_model_is_away_for_a_while(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)

    async def scenario(llm: AsyncLLM) -> None:
        expected = tokens_of(await llm.agenerate(PROMPTS, LONG))
        running = asyncio.ensure_future(llm.agenerate(PROMPTS, LONG))
        impatient = asyncio.ensure_future(llm.agenerate("a", LONG, timeout=0.5))
        await asyncio.sleep(0)
        model.rename(tmp_path / "away")
        os.kill(engine_pid(llm), signal.SIGKILL)
        with pytest.raises(RequestTimeout):
            await impatient
        while "is tried again" not in llm.readiness()[1]:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineDead):
            await llm.stats()
        (tmp_path / "away").rename(model)
        assert tokens_of(await running) == expected
        assert llm.readiness()[0]

    run(model, scenario)


def test_another_model_in_the_same_place(tiny_llama: Path, tmp_path: Path) -> None:
    """No request goes on with other weights than those that it began with."""
    model, weights = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    shutil.copytree(tiny_llama, model)
    right = weights.read_bytes()

    async def scenario(llm: AsyncLLM) -> None:
        expected = tokens_of(await llm.agenerate(PROMPTS, LONG))
        running = asyncio.ensure_future(llm.agenerate(PROMPTS, LONG))
        await asyncio.sleep(0)
        (tmp_path / "new").write_bytes(right[:-2] + bytes([right[-2] ^ 1, right[-1]]))
        (tmp_path / "new").rename(weights)  # what is mapped stays as it was
        os.kill(engine_pid(llm), signal.SIGKILL)
        while "files have changed" not in llm.readiness()[1]:
            assert not running.done()
            await asyncio.sleep(0.01)
        (tmp_path / "new").write_bytes(right)
        (tmp_path / "new").rename(weights)
        assert tokens_of(await running) == expected

    run(model, scenario)


def test_no_descriptor_is_free(tiny_llama: Path) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        expected = tokens_of(await llm.agenerate(PROMPTS, SHORT))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        os.kill(engine_pid(llm), signal.SIGKILL)
        running = asyncio.ensure_future(llm.agenerate(PROMPTS, SHORT))
        await until_ready(llm, False)
        while "is tried again" not in llm.readiness()[1]:
            await asyncio.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert tokens_of(await running) == expected

    run(tiny_llama, scenario)


# A3 to A9: callers


def test_a_question_that_nobody_waits_for(tiny_llama: Path) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        running = asyncio.ensure_future(llm.agenerate("a", LONG))
        for seconds in (0.0001, 0.001, 0.00001):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(llm.stats(), seconds)
        assert (await running)[0].finished and (await llm.stats()).steps

    run(tiny_llama, scenario)


def test_a_stream_that_the_garbage_collector_ends(llm: LLM) -> None:
    """While another thread generates, with logprobs, so that collections run in any thread at any place."""
    gc.collect()
    threshold = gc.get_threshold()
    gc.set_threshold(5)
    try:
        params = SamplingParams(max_tokens=20, logprobs=20, ignore_eos=True)
        busy = threading.Thread(target=lambda: llm.generate(["a"] * 8, params, use_tqdm=False), daemon=True)
        busy.start()
        for _ in range(20):
            stream: Iterator[RequestOutput] = llm.stream("b", LONG)
            next(stream)
            cycle = [stream]
            cycle.append(cycle)  # type: ignore[arg-type]
            del stream, cycle
        busy.join(30)
        assert not busy.is_alive()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    llm.generate("c", SHORT, use_tqdm=False)
    assert llm.stats().running == 0


def test_an_event_loop_that_closes_before_the_answer(llm: LLM) -> None:
    async def leave() -> None:
        task = asyncio.ensure_future(llm.agenerate("a", LONG))
        await asyncio.sleep(0.01)
        task.cancel = lambda *_: False  # type: ignore[method-assign]  # asyncio.run cannot end it in good order

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    assert llm.generate("b", SHORT, use_tqdm=False)[0].finished
    assert asyncio.run(llm.agenerate("b", SHORT))[0].finished


def test_ids_that_look_alike(tiny_llama: Path) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        async def collect(id: str, n: int) -> int:
            params = SamplingParams(max_tokens=20, n=n, ignore_eos=True)
            return sum([len(c.token_ids) async for i in llm.generate("a", params, request_id=id) for c in i.outputs])

        assert await asyncio.gather(collect("a", 2), collect("a#0", 1), collect("0", 1)) == [40, 20, 20]
        first = llm.generate("a", LONG, request_id="b")
        await anext(first)
        with pytest.raises(InvalidRequest, match="'b' is running"):
            await collect("b", 1)
        await first.aclose()
        for wrong in (5, "", "a" * 300, "a\nb"):
            with pytest.raises(InvalidRequest, match="request_id"):
                await collect(wrong, 1)  # type: ignore[arg-type]

    run(tiny_llama, scenario)


def test_values_of_any_type(tiny_llama: Path) -> None:
    """Each is served as the number that it is, or refused; none is sent that an engine cannot read."""

    async def scenario(llm: AsyncLLM) -> None:
        for wrong in ({"stop_token_ids": [True]}, {"logit_bias": {True: 1.0}}, {"stop": [b"x"]}, {"seed": 1.5}):
            with pytest.raises(InvalidRequest):
                await llm.agenerate("a", SamplingParams(**wrong))
        for prompt in ([True], [1.0], [np.int64(5), "a"], None, 5.0, [[5]]):
            with pytest.raises(InvalidRequest):
                await llm.agenerate([prompt])  # type: ignore[list-item]
        params = SamplingParams(temperature=np.float64(0.7), top_k=np.int32(5), seed=np.int64(3), max_tokens=5)
        assert (await llm.agenerate("a", params))[0].finished
        assert len(llm._frontend._ledger) == 0
        os.kill(engine_pid(llm), signal.SIGKILL)
        assert (await llm.agenerate("a", params))[0].finished

    run(tiny_llama, scenario)


def test_another_event_loop(tiny_llama: Path) -> None:
    llm = AsyncLLM(str(tiny_llama))

    async def use() -> None:
        with pytest.raises(EngineDead, match=r"within one asyncio\.run"):
            await llm.agenerate("a", SHORT)

    async def first() -> None:
        await llm.start()
        await llm.agenerate("a", SHORT)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(first())
    asyncio.run(use())
    loop.run_until_complete(llm.close())
    loop.close()


def test_a_forked_child(llm: LLM) -> None:
    llm.generate("a", SHORT, use_tqdm=False)

    def use(answers: "multiprocessing.connection.Connection") -> None:
        for call in (lambda: llm.generate("a", SHORT, use_tqdm=False), llm.stats, lambda: next(llm.stream("a", SHORT))):
            try:
                call()
            except EngineDead as error:
                answers.send(str(error))
        os._exit(0)

    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=use, args=(there,))
    child.start()
    for _ in range(3):
        assert here.poll(30) and "create one in this process" in here.recv()
    child.join(30)
    assert llm.generate("a", SHORT, use_tqdm=False)[0].finished


# A10: suspended engines


def test_a_suspended_engine_is_replaced(tiny_llama: Path) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        expected = tokens_of(await llm.agenerate(PROMPTS, LONG))
        running = asyncio.ensure_future(llm.agenerate(PROMPTS, LONG))
        impatient = asyncio.ensure_future(llm.agenerate("a", LONG, timeout=0.3))
        await asyncio.sleep(0)
        suspended = engine_pid(llm)
        os.kill(suspended, signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(EngineDead):
            await llm.stats()
        with pytest.raises(RequestTimeout):
            await impatient
        assert time.monotonic() - begun < 2
        assert tokens_of(await running) == expected
        with pytest.raises(ProcessLookupError):
            os.kill(suspended, 0)

    run(tiny_llama, scenario)


def test_closing_with_a_suspended_engine(tiny_llama: Path) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        running = asyncio.ensure_future(llm.agenerate("a", LONG))
        await asyncio.sleep(0)
        os.kill(engine_pid(llm), signal.SIGSTOP)
        await llm.close()
        with pytest.raises(EngineDead, match="shut down"):
            await running

    run(tiny_llama, scenario)
