"""A bounded queue: who does not fit in is told when to come again, and is served in the end."""

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo import LLM, AsyncLLM, SamplingParams
from octavo.errors import InvalidRequest, PromptTooLong, QueueFull
from octavo.frontend.admission import Admission
from server_process import ServerProcess

ENDLESS = SamplingParams(max_tokens=480, ignore_eos=True, n=2)
SMALL = ("--max-batch-size", "2", "--max-queue", "4")


def refused(admission: Admission, live: int, asked: int) -> int:
    """The seconds that it says."""
    with pytest.raises(QueueFull) as error:
        admission.check(live, asked)
    assert str(error.value.retry_after) in str(error.value)
    return error.value.retry_after


def test_the_bound() -> None:
    admission = Admission(at_once=2, queue=3)
    for live, asked in ((0, 1), (0, 5), (4, 1)):
        admission.check(live, asked)
    for live, asked in ((5, 1), (4, 2), (1, 5)):
        assert refused(admission, live, asked) >= 1
    with pytest.raises(InvalidRequest, match="6 completions in one call exceed the limit of 5"):
        admission.check(0, 6)
    assert admission.refused == 3


def test_the_refused_come_back_one_after_the_other() -> None:
    """As fast as places become free, and not all at once."""
    now = 0.0
    admission = Admission(at_once=2, queue=8, clock=lambda: now)
    admission.check(0, 10)
    for _ in range(5):  # two places every five seconds
        now += 5
        admission.left(2, live=10)
    assert [refused(admission, 10, 1) for _ in range(4)] == [3, 5, 8, 10]
    assert refused(admission, 8, 4) == 15  # two places are free, and it needs two more
    now += 5
    admission.left(2, live=10)
    assert refused(admission, 10, 1) == 13  # six are promised, two have become free
    for _ in range(100):
        assert refused(admission, 10, 1) <= 60


def test_idle_time_does_not_make_the_server_seem_slow() -> None:
    now = 0.0
    admission = Admission(at_once=2, queue=2, clock=lambda: now)
    for _ in range(10):  # one at a time, hours apart
        admission.check(0, 1)
        now += 1
        admission.left(1, live=1)
        now += 10_000
    admission.check(0, 4)
    assert refused(admission, 4, 1) == 1  # nothing is known yet
    now += 8
    admission.left(1, live=4)
    assert refused(admission, 4, 1) == 8


@pytest.mark.parametrize("service", [0.02, 0.5, 3.0])
def test_clients_that_do_as_they_are_told_are_served(service: float) -> None:
    """Simulated: 40 places, served one at a time; 60 clients come at once, and 20 find no place."""
    now, live, rng = 0.0, 0, random.Random(1)
    admission = Admission(at_once=1, queue=39, clock=lambda: now)
    coming = [(rng.random() * service, 0) for _ in range(60)]  # when, after how many refusals
    refusals, next_end = [], service
    while coming or live:
        coming.sort()
        if live and (not coming or next_end <= coming[0][0]):
            now = next_end
            admission.left(1, live)
            live -= 1
            next_end = now + service
            continue
        now, tries = coming.pop(0)
        try:
            admission.check(live, 1)
        except QueueFull as error:
            coming.append((now + error.retry_after, tries + 1))
            continue
        next_end = next_end if live else now + service
        live += 1
        refusals.append(tries)
    assert len(refusals) == 60
    assert max(refusals) <= 2  # as often as the openai client tries again


# The real thing


def test_a_burst_beyond_the_queue(tiny_llama: Path) -> None:
    """Patient clients are all served, impatient ones refused in OpenAI's words; who is inside notices nothing."""

    async def ask(client: openai.AsyncOpenAI, i: int) -> Any:
        options: Any = {"extra_body": {"ignore_eos": True}, "max_tokens": 60, "temperature": 0}
        try:
            reply = await client.completions.create(model="tiny", prompt=f"Request {i}", **options)
        except openai.InternalServerError as error:
            return error
        return reply.choices[0].text

    async def burst(url: str, retries: int, size: int) -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=retries) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(size)))

    with ServerProcess(tiny_llama, "--max-batch-size", "2", "--max-queue", "14") as server:
        alone = [asyncio.run(burst(server.url, 0, 1))[0]]
        impatient = asyncio.run(burst(server.url, 0, 30))
        errors = [error for error in impatient if isinstance(error, openai.InternalServerError)]
        assert 0 < len(errors) < 30 and impatient[0] in (alone[0], *errors)
        for error in errors:
            assert (error.status_code, error.code, error.type) == (503, "queue_full", "server_error")
            assert 1 <= int(error.response.headers["retry-after"]) <= 60
        patient = asyncio.run(burst(server.url, 10, 30))
        assert patient[0] == alone[0] and all(isinstance(text, str) for text in patient)
        assert all(was in (text, *errors) for was, text in zip(impatient, patient, strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_server(tiny_llama: Path, stream: bool) -> None:
    """It refuses, is healthy, and tells how full it is; what can never fit is another matter."""
    with ServerProcess(tiny_llama, *SMALL) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        endless = {"prompt": "a", "n": 6, "max_tokens": 480, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=endless) as running:
            assert running.status_code == 200
            for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": [USER]})):
                reply = http.post(f"/v1/{path}", json=body | {"stream": stream})
                assert (reply.status_code, reply.json()["error"]["code"]) == (503, "queue_full")
                assert 1 <= int(reply.headers["retry-after"]) <= 60
            assert http.get("/health").status_code == 200
            stats = http.get("/stats").json()["models"][0]["frontend"]
            assert stats == {"live": 6, "limit": 6, "refused": 2, "timed_out": 0, "tenants": {"": 6}}
        while http.get("/stats").json()["models"][0]["frontend"][
            "live"
        ]:  # until the server has noticed that the stream was left
            pass
        for body in ({"prompt": ["x"] * 7}, {"prompt": ["x", "y"], "n": 4}):
            reply = http.post("/v1/completions", json=body | {"stream": stream})
            assert reply.status_code == 400 and "exceed the limit of 6" in reply.json()["error"]["message"]


USER = {"role": "user", "content": "x"}


def test_async_llm_takes_all_or_none(tiny_llama: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(str(tiny_llama), max_batch_size=1, max_queue=3) as llm:
            iterator = llm.generate("a", ENDLESS)
            await anext(iterator)
            with pytest.raises(QueueFull):
                await llm.agenerate(["b", "c", "d"], SamplingParams(max_tokens=1))
            assert llm.frontend_stats().live == 2
            assert len(await llm.agenerate(["b", "c"], SamplingParams(max_tokens=1))) == 2
            await iterator.aclose()
            assert len(await llm.agenerate(["b", "c", "d", "e"], SamplingParams(max_tokens=1))) == 4

    asyncio.run(main())


def test_a_batch_offline_is_never_refused(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), max_batch_size=2, max_queue=0) as llm:
        assert len(llm.generate(["a"] * 20, SamplingParams(max_tokens=2, n=2), use_tqdm=False)) == 20


def test_a_pool_smaller_than_the_context(tiny_llama: Path) -> None:
    """What would not fit into it alone is refused at once; all else is served, forks of it too."""
    with LLM(str(tiny_llama), kv_cache_memory=4 * 32 * 2 * 3 * 2 * 32 * 2) as llm:
        assert llm.stats().num_pages == 4
        with pytest.raises(PromptTooLong, match=r"has 128 tokens; .* 128 has room for at most 127"):
            llm.generate([5] * 128)
        [output] = llm.generate([5] * 120, SamplingParams(max_tokens=None, n=3, ignore_eos=True), use_tqdm=False)
        assert [len(completion.token_ids) for completion in output.outputs] == [8, 8, 8]
        [output] = llm.generate([5] * 120, SamplingParams(max_tokens=10_000, ignore_eos=True), use_tqdm=False)
        assert output.outputs[0].finish_reason == "length" and len(output.outputs[0].token_ids) == 8
        assert len(llm.generate([[i] * 100 for i in range(9)], SamplingParams(max_tokens=20), use_tqdm=False)) == 9
