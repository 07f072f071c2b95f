"""Speculation changes how many steps it takes, never a token."""

import random
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import LLM, SamplingParams
from octavo.engine.speculation import LONGEST, SHORTEST, propose_draft


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, 300), min_size=1, max_size=40), limit=st.integers(1, 6))
def test_guesses_are_what_followed_last_time(tokens, limit):
    expected: list[int] = []
    for length in range(LONGEST, SHORTEST - 1, -1):
        earlier = [at for at in range(len(tokens) - length) if tokens[at : at + length] == tokens[-length:]]
        if length < len(tokens) and earlier:
            expected = tokens[earlier[-1] + length :][:limit]
            break
    assert propose_draft(array("i", tokens), limit).tolist() == expected


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40), limit=st.integers(1, 6))
def test_guesses_in_repetitive_text(tokens, limit):
    test_guesses_are_what_followed_last_time.hypothesis.inner_test(tokens, limit)


def requests(vocab: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that repeat themselves; greedy and seeded, with penalties, stop tokens, min_tokens, logprobs."""
    rng = random.Random(0)
    phrase = [rng.randrange(3, vocab) for _ in range(12)]
    prompts = [(phrase * 6)[rng.randrange(8) :][: rng.randrange(20, 60)] for _ in range(12)]
    params = []
    for i in range(12):
        extra = [{}, {"frequency_penalty": 0.3}, {"stop_token_ids": phrase[:2], "min_tokens": 9}, {"logprobs": 2}][
            i % 4
        ]
        temperature = 0.4 * (i % 3)
        params.append(SamplingParams(temperature=temperature, seed=i, max_tokens=40, ignore_eos=True, **extra))
    return prompts, params


def results(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[object]:
    return [output.outputs for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("settings", [{}, {"max_batch_size": 1}, {"max_batch_tokens": 7}, {"kv_cache_memory": "tiny"}])
def test_the_same_tokens(tiny_llama: Path, settings: dict[str, object]):
    with LLM(str(tiny_llama)) as llm:
        prompts, params = requests(512)
        expected = results(llm, prompts, params)
        plain = llm.stats()
        if settings == {"kv_cache_memory": "tiny"}:
            page_bytes = llm._frontend.replicas[0].link.engine.backend.page_bytes
            settings = {"kv_cache_memory": 8 * page_bytes, "max_model_len": 128}
    with LLM(str(tiny_llama), speculative_tokens=5, **settings) as llm:
        assert results(llm, prompts, params) == expected
        stats = llm.stats()
    assert stats.draft_tokens > stats.accepted_tokens
    assert stats.free_pages + stats.cached_pages == stats.num_pages
    assert plain.draft_tokens == 0


def test_right_guesses_save_steps(smollm2: Path):
    copy = "red green blue " * 8
    with LLM(str(smollm2)) as llm:
        slow = llm.generate(copy, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))[0]
        before = llm.stats()
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, speculative_tokens=6)
        fast = llm.generate(copy, params)[0]
        after = llm.stats()
    assert fast.outputs == slow.outputs
    assert after.accepted_tokens > 5
    assert after.steps - before.steps == 40 - after.accepted_tokens
