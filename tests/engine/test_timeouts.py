"""Requests that take too long: kept by the engine on a clock that tests turn, told to users in Python and over HTTP."""

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import LLM, AsyncLLM, SamplingParams
from octavo.engine.deadlines import Deadlines
from octavo.engine.engine import Engine
from octavo.engine.messages import EngineRequest, TokenOutput
from octavo.errors import RequestTimeout
from prefix_backend import PrefixBackend, complete
from server_process import COMPLETIONS, ServerProcess, post, serving

ENDLESS = SamplingParams(max_tokens=480, ignore_eos=True, n=128)  # seconds, one after the other
START = 1000.0

IDS = st.sampled_from("abc")
OPERATIONS = st.one_of(
    st.tuples(st.just("set"), IDS, st.integers(0, 50)),
    st.tuples(st.just("forget"), IDS),
    st.tuples(st.just("passed"), st.integers(0, 50)),
)


@settings(deadline=None)
@given(st.lists(OPERATIONS, min_size=10, max_size=60), st.integers(0, 3))
def test_deadlines_are_those_of_a_dictionary(operations: list[tuple], slack: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.engine.deadlines._SLACK", slack)
        deadlines, model, now = Deadlines(), {}, 0
        for name, *arguments in operations:
            if name == "set" and arguments[0] not in model:
                deadlines.set(*arguments)
                model[arguments[0]] = arguments[1]
            elif name == "forget":
                deadlines.forget(*arguments)
                model.pop(*arguments, None)
            elif name == "passed":
                now = max(now, *arguments)
                due = sorted((at, id) for id, at in model.items() if at <= now)
                assert deadlines.passed(now) == [id for _, id in due]
                for _, id in due:
                    del model[id]
            assert len(deadlines) == len(model)
            assert len(deadlines._heap) <= 2 * len(model) + slack + 1


class Clocked:
    """An engine on a clock that the test turns."""

    def __init__(self, num_pages: int = 64, **settings: float):
        self.now = START
        self.engine = Engine(
            PrefixBackend(num_pages, 4),
            num_pages=num_pages,
            max_model_len=200,
            max_batch_size=2,
            max_batch_tokens=16,
            clock=lambda: self.now,
            **settings,
        )

    def add(self, id: str, timeout: float | None, max_tokens: int = 30, after: str | None = None) -> None:
        params = SamplingParams(max_tokens=max_tokens)
        self.engine.add(EngineRequest(id, [0, 1, 2], params, self.now - START, after=after, timeout=timeout))

    def step(self, seconds: float = 1.0) -> dict[str, TokenOutput]:
        self.now += seconds
        return {output.id: output for output in self.engine.step()}

    def run(self) -> dict[str, list[int]]:
        tokens: dict[str, list[int]] = {}
        while self.engine.has_work:
            for output in self.step().values():
                tokens.setdefault(output.id, []).append(output.token)
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.free_pages + stats.cached_pages) == (0, 0, stats.num_pages)
        assert len(self.engine._deadlines) == 0
        return tokens


@pytest.fixture
def clocked() -> Iterator[Clocked]:
    yield Clocked()


def test_a_running_and_a_waiting_request_time_out(clocked: Clocked) -> None:
    clocked.add("running", 5)
    clocked.add("other", None)
    clocked.add("waiting", 5.5)
    assert [set(clocked.step()) for _ in range(4)] == [{"running", "other"}] * 4
    ended = clocked.step()["running"]  # at 5 s
    assert (ended.finish_reason, ended.token) == ("timeout", -1)
    assert ended.message == "the request did not end within its timeout of 5 seconds"
    assert clocked.step()["waiting"].finish_reason == "timeout"
    assert clocked.run()["other"] == complete([0, 1, 2], 30)[6:]


def test_what_ends_in_time_does_not_time_out(clocked: Clocked) -> None:
    """Nor does a later request of the same id."""
    clocked.add("a", 10, max_tokens=3)
    assert clocked.run()["a"] == complete([0, 1, 2], 3)
    clocked.add("a", 20, max_tokens=30)
    clocked.engine.abort(["a"])
    clocked.add("a", None, max_tokens=30)
    assert clocked.run()["a"] == complete([0, 1, 2], 30)


def test_forks_time_out_with_the_first(clocked: Clocked) -> None:
    clocked.add("a#0", 0.5)
    clocked.add("a#1", 0.5, after="a#0")
    clocked.add("b", None, max_tokens=2)
    ended = clocked.step()
    assert {id: output.finish_reason for id, output in ended.items()} == {"a#0": "timeout", "a#1": "timeout", "b": None}
    assert list(clocked.run()) == ["b"]


def test_the_engines_own_timeout_is_for_requests_that_do_not_say() -> None:
    clocked = Clocked(request_timeout=3.0)
    clocked.add("long", 20, max_tokens=10)
    clocked.add("unsaid", None)
    outputs = [clocked.step() for _ in range(3)]
    assert outputs[2]["unsaid"].finish_reason == "timeout"
    assert len(clocked.run()["long"]) == 10 - 3


def test_a_timeout_frees_pages_for_those_who_wait() -> None:
    clocked = Clocked(num_pages=8)
    clocked.add("hog", 10, max_tokens=29)
    clocked.step()
    clocked.engine.add(EngineRequest("next", [1] * 28, SamplingParams(max_tokens=4), 1.0))
    assert clocked.run()["next"] == complete([1] * 28, 4)


# As users see it


def test_python(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), request_timeout=0.1, max_batch_size=1) as llm:
        with pytest.raises(RequestTimeout, match=r"within its timeout of 0\.1 seconds"):
            llm.generate("a", ENDLESS, use_tqdm=False)
        with pytest.raises(TimeoutError):
            list(llm.stream("a", ENDLESS, timeout=0.05))
        assert llm.generate("a", SamplingParams(max_tokens=4), use_tqdm=False, timeout=60)[0].finished
        assert llm.stats().running == 0


@pytest.mark.parametrize("hours", [-2, 2])
def test_the_wall_clock_may_jump(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """Neither do live requests time out, nor do KV states expire."""
    real = time.time
    with LLM(str(tiny_llama), kv_state_ttl=60) as llm:
        first = llm.generate("a", SamplingParams(max_tokens=4), use_tqdm=False)[0]
        state = llm.get_kv_cache_state(first.request_id)
        increments = llm.stream("a", SamplingParams(max_tokens=100, ignore_eos=True), timeout=60)
        next(increments)
        monkeypatch.setattr(time, "time", lambda: real() + 3600 * hours)
        assert sum(len(increment.outputs[0].token_ids) for increment in increments) > 90
        [output] = llm.generate("b", SamplingParams(max_tokens=4), use_tqdm=False, timeout=60, kv_cache_state=state)
        assert output.finished


def test_async_llm(tiny_llama: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(str(tiny_llama), max_batch_size=1) as llm:
            with pytest.raises(RequestTimeout):
                await llm.agenerate("a", ENDLESS, timeout=0.05)
            with pytest.raises(RequestTimeout):
                async for _ in llm.generate("a", ENDLESS, timeout=0.05):
                    pass
            stats = await llm.stats()
            assert (stats.running, stats.waiting, stats.free_pages + stats.cached_pages) == (0, 0, stats.num_pages)
            assert (llm.frontend_stats().live, llm.frontend_stats().timed_out) == (0, 2)

    asyncio.run(main())


def test_the_openai_client_is_told_once(tiny_llama: Path) -> None:
    """It repeats requests by itself after errors of the server: not this one. And its neighbor is served."""
    with ServerProcess(tiny_llama, "--max-batch-size", "1") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5)
        other = client.completions.create(
            model="tiny", prompt="b", max_tokens=480, n=128, stream=True, extra_body={"ignore_eos": True}
        )
        next(other)
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(model="tiny", prompt="a", extra_body={"timeout": 0.05})
        assert (error.value.status_code, error.value.code) == (504, "request_timeout")
        assert httpx.get(f"{server.url}/stats").json()["models"][0]["frontend"]["timed_out"] == 1
        assert all(chunk.choices for chunk in itertools.islice(other, 100))
        other.close()


def test_a_stream_that_times_out_ends_with_an_error_event(tiny_llama: Path) -> None:
    async def main() -> bytes:
        async with serving(tiny_llama, max_batch_size=1) as (_, _, address):
            endless = {"prompt": "a", "max_tokens": 480, "n": 128, "ignore_eos": True}
            reader, _ = await post(address, {**endless, "stream": True, "timeout": 0.5}, COMPLETIONS)
            return await reader.read()

    got = asyncio.run(main())
    assert got.startswith(b"HTTP/1.1 200 ")
    *_, last = (line for line in got.split(b"\n") if line.startswith(b"data: "))
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "request_timeout"
