"""LLM.generate_iter: prompts of any iterator, in order, in bounded memory; compared with `generate`."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.errors import EngineDead, InvalidRequest, PromptTooLong, RequestTimeout
from octavo.frontend.prompt_stream import WINDOW_BLOCKS

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
BATCH = 4  # of `small`; its blocks have 8 prompts


@pytest.fixture(scope="module")
def small(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama), max_batch_size=BATCH) as llm:
        yield llm


def counted(prompts: Iterator[Any], read: list[int]) -> Iterator[Any]:
    for number, prompt in enumerate(prompts, 1):
        read[0] = number
        yield prompt


def wait_until_idle(llm: LLM) -> None:
    while (stats := llm.stats()).running or stats.waiting:
        pass


def test_the_same_outputs_in_order(small: LLM) -> None:
    prompts = [f"Once {number} upon" for number in range(50)]
    lengths = itertools.cycle([2, 9, 1, 30])
    long = [[5 + number % 7] * length for number, length in zip(range(50), lengths, strict=False)]
    for given in (prompts, long):
        expected = [output.text for output in small.generate(given, GREEDY)]
        outputs = list(small.generate_iter(iter(given), GREEDY))
        assert [output.text for output in outputs] == expected
        assert all(output.finished and output.error is None for output in outputs)
        assert len({output.request_id for output in outputs}) == 50
    assert [output.prompt for output in small.generate_iter(iter(prompts), GREEDY)] == prompts
    assert list(small.generate_iter([], GREEDY)) == []


def test_no_more_prompts_are_read_than_the_window_has(small: LLM) -> None:
    window, read = WINDOW_BLOCKS * 2 * BATCH, [0]
    outputs = small.generate_iter(counted(iter(lambda: "endless", None), read), GREEDY)
    assert read == [0]  # nothing is read before the first output is wanted
    for taken in range(1, 60):
        assert next(outputs).finished
        wait_until_idle(small)  # as beside a slow consumer
        assert 0 < read[0] - taken <= window
    outputs.close()
    wait_until_idle(small)
    assert read[0] < 60 + window


def test_the_engine_is_kept_full(small: LLM) -> None:
    """Short outputs go on beside a long one, and there are always enough requests for a whole batch."""
    outputs = small.generate_iter((f"Row {number}" for number in range(300)), GREEDY)
    next(outputs)
    for _ in range(200):
        next(outputs)
    before = small.stats()
    list(outputs)
    after = small.stats()
    assert (after.tokens_generated - before.tokens_generated) / (after.steps - before.steps) > 0.7 * BATCH


def test_a_bad_prompt_is_its_own_fault(small: LLM) -> None:
    good = small.generate("good", GREEDY)[0].text
    bad = ["", [600], [5] * 600, 5, {"prompt": "x", "image": 1}, [{"role": "user", "content": b"x"}], [{"role": 3}]]
    prompts = [prompt for each in bad for prompt in ("good", each)] + ["good"]
    outputs = list(small.generate_iter(prompts, GREEDY))
    assert [output.text for output in outputs[::2]] == [good] * (len(bad) + 1)
    for output in outputs[1::2]:
        assert isinstance(output.error, InvalidRequest), output
        assert output.finished and (output.text, output.outputs[0].finish_reason) == ("", "error")
    assert isinstance(outputs[5].error, PromptTooLong)


def test_requests_that_time_out(small: LLM) -> None:
    outputs = list(small.generate_iter(["a", "b"], SamplingParams(max_tokens=None, ignore_eos=True), timeout=0.001))
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "error"]
    assert all(isinstance(output.error, RequestTimeout) for output in outputs)
    assert small.generate("still there", GREEDY)[0].finished


def test_an_exception_of_the_prompts_comes_after_the_outputs_before_it(small: LLM) -> None:
    def prompts() -> Iterator[str]:
        for number in range(19):
            yield f"Once {number}"
        raise KeyError("the 20th row")

    outputs = small.generate_iter(prompts(), GREEDY)
    assert [next(outputs).prompt for _ in range(19)] == [f"Once {number}" for number in range(19)]
    with pytest.raises(KeyError, match="the 20th row"):
        next(outputs)
    wait_until_idle(small)


def test_leaving_early_aborts_what_runs(small: LLM) -> None:
    params, before = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True), small.stats().tokens_generated
    for output in small.generate_iter((f"{i}" for i in itertools.count()), params):
        assert output.finished
        break
    wait_until_idle(small)
    assert small.stats().tokens_generated - before < 6 * 400  # of 8 requests in the engine
    assert small.generate("still there", GREEDY)[0].finished


def test_wrong_arguments_are_refused_at_once(small: LLM) -> None:
    with pytest.raises(InvalidRequest, match="an iterable of prompts"):
        small.generate_iter("one prompt", GREEDY)
    with pytest.raises(InvalidRequest, match="beyond the vocabulary"):
        small.generate_iter(["a"], SamplingParams(stop_token_ids=[512]))
    with pytest.raises(InvalidRequest, match="priority"):
        small.generate_iter(["a"], GREEDY, priority=10**6)


def test_conversations(small: LLM) -> None:
    chats = [[{"role": "user", "content": f"Hello {number}"}] for number in range(5)]
    expected = [output.text for output in small.chat(chats, GREEDY)]
    assert [output.text for output in small.generate_iter(iter(chats), GREEDY)] == expected


def test_rows_with_a_common_prefix_run_next_to_each_other(tiny_llama: Path) -> None:
    """The cache has pages for few sequences, so an alternation of prefixes would evict each before its next use."""
    prompts = [[10 + number % 4] * 200 + [20 + number] for number in range(32)]
    settings = {"max_batch_size": 16, "max_model_len": 256, "kv_cache_memory": 20 * 24576}
    with LLM(str(tiny_llama), **settings) as llm:
        alternating = sum(output.num_cached_tokens for output in llm.generate(prompts, GREEDY))
    with LLM(str(tiny_llama), **settings) as llm:
        together = sum(output.num_cached_tokens for output in llm.generate_iter(iter(prompts), GREEDY))
    assert together > 0.5 * 32 * 192 and alternating < together / 2


def test_an_engine_that_is_shut_down(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), max_batch_size=BATCH)
    outputs = llm.generate_iter((f"{i}" for i in itertools.count()), SamplingParams(max_tokens=100, ignore_eos=True))
    next(outputs)
    llm.shutdown()
    with pytest.raises(EngineDead):
        list(outputs)
