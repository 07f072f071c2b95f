"""The rest of vLLM's Python API: tokenizer, metrics, cache reset, sleep, chat templates and prompts as dictionaries."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from octavo import LLM, AsyncLLM, SamplingParams, TextPrompt, TokensPrompt
from octavo.errors import EngineDead, InvalidRequest
from octavo.frontend.metrics import Counter, Gauge

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(seed=1, max_tokens=400, ignore_eos=True)
PROMPT = [37 * i % 500 for i in range(100)]
MESSAGES = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "The answer is"}]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ mood }}{% if tools %}{{ tools }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama)) as llm:
        yield llm


def tokens_of(llm: LLM, prompt: Any) -> list[int]:
    [output] = llm.generate(prompt, GREEDY, use_tqdm=False)
    return output.outputs[0].token_ids


def test_prompts_as_dictionaries(llm: LLM) -> None:
    ids = llm.tokenizer.encode("The module")
    expected = tokens_of(llm, "The module")
    assert tokens_of(llm, TextPrompt(prompt="The module")) == expected
    assert tokens_of(llm, TokensPrompt(prompt_token_ids=ids)) == expected
    assert tokens_of(llm, {"prompt": "ignored", "prompt_token_ids": ids, "multi_modal_data": None}) == expected
    with pytest.raises(InvalidRequest, match="multi_modal_data"):
        tokens_of(llm, {"prompt": "The module", "multi_modal_data": {"image": 1}})


def test_the_tokenizer_speaks_as_that_of_transformers(llm: LLM, tiny_llama: Path) -> None:
    ours, theirs = llm.get_tokenizer(), AutoTokenizer.from_pretrained(tiny_llama)
    for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
        text = theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert ours.apply_chat_template(MESSAGES, tokenize=False, **options) == text
        assert ours.apply_chat_template(MESSAGES, **options) == theirs.encode(text)
    assert ours.eos_token_id == theirs.eos_token_id and ours.bos_token_id == theirs.bos_token_id
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()


def test_chats_with_options(llm: LLM, tiny_llama: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(tiny_llama)

    def rendered(**options: Any) -> str:
        [output] = llm.chat(MESSAGES, GREEDY, use_tqdm=False, **options)
        return llm.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    assert rendered() == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert rendered(add_generation_prompt=False) == theirs.apply_chat_template(MESSAGES, tokenize=False)
    continued = theirs.apply_chat_template(MESSAGES, tokenize=False, continue_final_message=True)
    assert rendered(continue_final_message=True) == continued
    assert rendered(continue_final_message=True, add_generation_prompt=False) == continued
    variables = {"mood": "!"}
    assert rendered(chat_template=TEMPLATE, chat_template_kwargs=variables).endswith("The answer is!")
    assert "'name': 'f'" in rendered(chat_template=TEMPLATE, tools=TOOLS)
    with pytest.raises(InvalidRequest, match="tools"):
        rendered(tools=TOOLS)
    with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
        rendered(chat_template_kwargs={"messages": []})
    two = llm.chat([MESSAGES, MESSAGES[:1]], GREEDY, use_tqdm=False, continue_final_message=True)
    assert two[0].prompt_token_ids == theirs.encode(continued) and len(two) == 2


def test_metrics(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), served_model_name="tiny") as llm:
        for _ in range(2):
            tokens_of(llm, PROMPT)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        assert all(metric.labels == {"model_name": "tiny", "engine": "0"} for metric in metrics.values())
        counters = {name: metric.value for name, metric in metrics.items() if isinstance(metric, Counter)}
        gauges = {name: metric.value for name, metric in metrics.items() if isinstance(metric, Gauge)}
    assert counters["vllm:prompt_tokens"] == counters["vllm:prefix_cache_queries"] == 200
    assert counters["vllm:generation_tokens"] == 16 and counters["vllm:prefix_cache_hits"] == 99
    assert gauges["vllm:num_requests_running"] == gauges["vllm:kv_cache_usage_perc"] == 0


def test_reset_of_the_prefix_cache(llm: LLM) -> None:
    def cached() -> int:
        [output] = llm.generate(PROMPT, GREEDY, use_tqdm=False)
        return output.num_cached_tokens

    assert (cached(), cached()) == (0, 99)
    assert llm.reset_prefix_cache()
    stats = llm.stats()
    assert (stats.cached_pages, stats.free_pages) == (0, stats.num_pages)
    [output] = llm.generate(PROMPT, GREEDY, use_tqdm=False)
    state = llm.get_kv_cache_state(output.request_id)
    assert output.num_cached_tokens == 0 and llm.reset_prefix_cache()
    [later] = llm.generate([7], GREEDY, kv_cache_state=state, use_tqdm=False)
    assert later.num_cached_tokens == 0 and later.prompt_token_ids == [*state.token_ids, 7]
    stream = llm.stream(PROMPT, LONG)
    next(stream)
    assert not llm.reset_prefix_cache()
    stream.close()


def num_engines() -> int:
    return sum(thread.name == "octavo-engine" for thread in threading.enumerate())


def test_sleep(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama)) as llm:
        expected, [whole] = tokens_of(llm, PROMPT), llm.generate(PROMPT, LONG, use_tqdm=False)
        state = llm.get_kv_cache_state(whole.request_id)
        stream, engines = llm.stream(PROMPT, LONG), num_engines()
        tokens = list(next(stream).outputs[0].token_ids)
        llm.sleep(level=2)
        assert llm.is_sleeping()
        for refused in (lambda: tokens_of(llm, PROMPT), lambda: asyncio.run(llm.agenerate("a")), llm.stats):
            with pytest.raises(EngineDead):
                refused()
        llm.sleep()
        deadline = time.monotonic() + 10
        while num_engines() != engines - 1:  # a thread is listed for a moment after its engine has been closed
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with pytest.raises(InvalidRequest, match="tags"):
            llm.wake_up(["weights"])
        llm.wake_up(["weights", "kv_cache"])
        llm.wake_up()
        assert not llm.is_sleeping() and tokens_of(llm, PROMPT) == expected
        for increment in stream:
            tokens += increment.outputs[0].token_ids
        assert tokens == whole.outputs[0].token_ids, "a request that ran goes on"
        [continued] = llm.generate([7], GREEDY, kv_cache_state=state, use_tqdm=False)
        assert continued.prompt_token_ids == [*state.token_ids, 7]
        for wrong in (0, 3, "1"):
            with pytest.raises(InvalidRequest, match="level"):
                llm.sleep(wrong)  # type: ignore[arg-type]


def test_async(tiny_llama: Path, llm: LLM) -> None:
    expected = tokens_of(llm, PROMPT)

    async def scenario() -> None:
        async with AsyncLLM(str(tiny_llama)) as other, asyncio.timeout(60):
            assert (await other.get_tokenizer()).encode("The module") == llm.tokenizer.encode("The module")
            for cached in (0, 99):
                [output] = await other.agenerate(PROMPT, GREEDY)
                assert output.num_cached_tokens == cached
            assert {metric.name: metric for metric in await other.get_metrics()}["vllm:prefix_cache_hits"].value == 99
            assert await other.reset_prefix_cache()
            [output] = await other.agenerate(PROMPT, GREEDY)
            assert output.num_cached_tokens == 0
            await other.sleep()
            assert await other.is_sleeping()
            waiting = asyncio.ensure_future(other.agenerate(PROMPT, GREEDY))
            await other.wake_up()
            [output] = await waiting
            assert output.outputs[0].token_ids == expected and not await other.is_sleeping()
            [chat] = await other.chat(MESSAGES, GREEDY, continue_final_message=True)
            assert chat.prompt_token_ids == llm.chat_tokens(MESSAGES, continue_final_message=True)

    asyncio.run(scenario())
