"""Several engines of one model: the same tokens from all of them, whatever happens to some of them."""

import asyncio
import importlib.util
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from octavo import LLM, AsyncLLM, RequestOutput, SamplingParams
from octavo.errors import ConfigError, ModelNotFound
from octavo.frontend.replica import Replica
from octavo.machine import share_of_cores

LONG = SamplingParams(seed=1, max_tokens=300, ignore_eos=True)
SHORT = SamplingParams(seed=2, max_tokens=8, ignore_eos=True)
PROMPTS = [f"{word} {i}" for word in ("class", "def", "import") for i in range(8)]


def run(model: Path, scenario: Callable[[AsyncLLM], Awaitable[None]], replicas: int = 2, **settings: object) -> None:
    async def main() -> None:
        async with AsyncLLM(str(model), data_parallel_size=replicas, **settings) as llm, asyncio.timeout(60):
            await scenario(llm)

    asyncio.run(main())


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def pid(replica: Replica) -> int:
    assert replica.link is not None and replica.link.pid is not None
    return replica.link.pid


async def begun(llm: AsyncLLM) -> None:
    """Wait until both engines have requests with tokens."""
    while not all(replica.load.completions and not replica.load.unstarted for replica in llm._frontend.replicas):
        await asyncio.sleep(0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV], ids=["killed", "suspended", "faulty"])
def test_requests_continue_on_the_other_engine(tiny_llama: Path, how: signal.Signals) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        expected = tokens_of(await llm.agenerate(PROMPTS, LONG))
        for victim in (0, 1):
            task = asyncio.ensure_future(llm.agenerate(PROMPTS, LONG))
            await begun(llm)
            os.kill(pid(llm._frontend.replicas[victim]), how)
            assert tokens_of(await task) == expected
            while not all(replica.is_ready for replica in llm._frontend.replicas):
                await asyncio.sleep(0.01)
        assert [replica.load.completions for replica in llm._frontend.replicas] == [0, 0]

    run(tiny_llama, scenario)


def test_a_drained_engine_hands_its_requests_over(tiny_llama: Path) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        expected = tokens_of(await llm.agenerate(PROMPTS, LONG))
        task = asyncio.ensure_future(llm.agenerate(PROMPTS, LONG))
        await begun(llm)
        await llm.scale(1)
        assert len(llm._frontend.replicas) == 1 and not task.done()
        assert tokens_of(await task) == expected
        await llm.scale(3)
        assert tokens_of(await llm.agenerate(PROMPTS, LONG)) == expected
        stats = await llm.replica_stats()
        assert [each.name for each in stats] == ["engine 0", "engine 1", "engine 2"]
        assert all(each.is_ready and each.engine is not None for each in stats)
        assert llm.readiness() == (True, "3 of 3 engines are ready")

    run(tiny_llama, scenario)


def test_an_engine_that_cannot_be_added_changes_nothing(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        def fail(number: int) -> None:
            raise OSError(f"no process for engine {number}")

        limit = llm.frontend_stats().limit
        with monkeypatch.context() as patch:
            patch.setattr(llm._frontend, "_connect", fail)
            with pytest.raises(OSError, match="no process for engine 2"):
                await llm.scale(4)
        assert [replica.is_ready for replica in llm._frontend.replicas] == [True, True]
        assert (llm.frontend_stats().limit, llm.config.data_parallel_size) == (limit, 2)
        assert all(output.finished for output in await llm.agenerate(PROMPTS, SHORT))

    run(tiny_llama, scenario)


def test_a_conversation_stays_where_its_pages_are(tiny_llama: Path) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        first = [[7 * i + j for j in range(70)] for i in range(6)]
        outputs = await llm.agenerate(first, SHORT)
        for output in outputs:  # one after the other, so that load does not matter
            prompt = output.prompt_token_ids + output.outputs[0].token_ids + [5, 6]
            [answer] = await llm.agenerate([prompt], SHORT)
            assert answer.metrics.cached_tokens >= 64
            assert answer.metrics.replica == output.metrics.replica
        assert {output.metrics.replica for output in outputs} == {"engine 0", "engine 1"}

    run(tiny_llama, scenario)


def test_a_state_survives_the_death_of_its_engine(tiny_llama: Path, tmp_path: Path) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        [output] = await llm.agenerate([list(range(70))], SHORT)
        state = await llm.get_kv_cache_state(output.request_id)
        expected = tokens_of(await llm.agenerate([[5]], SHORT, kv_cache_state=state))
        home = llm._frontend.kv_states._holder(state)
        os.kill(pid(home), signal.SIGKILL)
        assert tokens_of(await llm.agenerate([[5]], SHORT, kv_cache_state=state)) == expected
        await state.save(tmp_path / "state.kv")
        loaded = await llm.load_kv_cache_state(tmp_path / "state.kv")
        for replica in llm._frontend.replicas:  # both have opened the file, or will when they are ready
            while not replica.is_ready:
                await asyncio.sleep(0.01)
            os.kill(pid(replica), signal.SIGKILL)
            assert tokens_of(await llm.agenerate([[5]], SHORT, kv_cache_state=loaded)) == expected

    run(tiny_llama, scenario)


def test_each_engine_has_its_own_pages_on_disk(tiny_llama: Path, tmp_path: Path) -> None:
    prompts = [[i] * 100 for i in range(5, 15)]

    async def compute(llm: AsyncLLM) -> None:
        outputs = await llm.agenerate(prompts, SHORT)
        assert {output.metrics.replica for output in outputs} == {"engine 0", "engine 1"}

    async def compute_again(llm: AsyncLLM) -> None:
        assert any(output.metrics.cached_tokens for output in await llm.agenerate(prompts, SHORT))

    for scenario in (compute, compute_again):
        run(tiny_llama, scenario, kv_disk=str(tmp_path / "pages"))
        folders = sorted((tmp_path / "pages").iterdir())
        assert [folder.name for folder in folders] == ["engine-0", "engine-1"]
        assert all(list(folder.rglob("*.page")) for folder in folders)


def test_an_overfull_engine_is_relieved(tiny_llama: Path) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        other, busy = llm._frontend.replicas
        other.is_leaving = True  # so that all requests go to one engine
        task = asyncio.ensure_future(llm.agenerate([[i] * 200 for i in range(60)], SHORT))
        while busy.load.completions < 60:
            await asyncio.sleep(0)
        other.is_leaving = False
        [extra] = await llm.agenerate([[3] * 20], LONG)  # its tokens show that the other engine has little work
        outputs = await task
        assert {output.metrics.replica for output in outputs} == {"engine 0", "engine 1"}
        assert extra.finished

    run(tiny_llama, scenario, max_batch_size=4, max_batch_tokens=64)


def test_no_engine_is_left_if_one_does_not_load(tiny_llama: Path, tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ModelNotFound):
            AsyncLLM(str(tmp_path / "nothing"), data_parallel_size=2)
        llm = AsyncLLM(str(tiny_llama), data_parallel_size=2)
        pids = [link.pid for link in llm._links]
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(Exception, match="killed by SIGKILL"):
            await llm.start()
        for each in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(each, 0)

    asyncio.run(main())


def test_llm_has_one_engine(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="use AsyncLLM"):
        LLM(str(tiny_llama), data_parallel_size=2)


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_shares_of_the_cores(of: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = {0, 2, 4, 5, 9}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    shares = [share_of_cores(number, of) for number in range(of)]
    assert set().union(*shares) == cores and all(shares)
    if of <= len(cores):
        assert sum(map(len, shares)) == len(cores)


def test_engines_fetch_pages_from_each_other(tiny_llama: Path) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        replicas = llm._frontend.replicas
        while not all(replica.load.address for replica in replicas):
            await asyncio.sleep(0.01)
        fetched = 0
        for first in range(20):  # pages that come later than they are computed are not used
            prompt = [first, *range(100, 299)]
            [output] = await llm.agenerate([prompt], SHORT)
            home = next(replica for replica in replicas if replica.name == output.metrics.replica)
            home.is_leaving = True  # so that the request goes to the other one
            [again], [other] = (
                await llm.agenerate([prompt], SHORT),
                await llm.agenerate([prompt], SHORT, cache_salt="x"),
            )
            home.is_leaving = False
            assert tokens_of([output]) == tokens_of([again]) == tokens_of([other])
            assert again.metrics.replica == other.metrics.replica != output.metrics.replica
            assert other.metrics.cached_tokens == 0
            fetched += again.metrics.cached_tokens
            if fetched:
                break
        stats = [each.engine for each in await llm.replica_stats() if each.engine is not None]
        assert sum(engine.tiers["peers"].hits for engine in stats) >= fetched / 32 > 0

    run(tiny_llama, scenario)


def test_without_zeromq_engines_compute_everything(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not among the packages that Octavo needs as a library."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "zmq" else find(name, *rest))

    async def scenario(llm: AsyncLLM) -> None:
        await llm.agenerate([[5] * 100, [6] * 100], SHORT)
        assert all(replica.load.pages and not replica.load.address for replica in llm._frontend.replicas)

    run(tiny_llama, scenario)
