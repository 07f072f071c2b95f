"""Parameters that restrict, end, rank or report tokens: allowed tokens, budgets, repetitions, best_of, all logprobs."""

import asyncio
import json
import math
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from octavo.errors import InvalidRequest
from octavo.params import StructuredOutputs
from tiny_models import save_tiny_model, save_tokenizer

PROMPT = "The module"
ALLOWED = list(range(40, 200, 3))


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama), max_logprobs=-1) as llm:
        yield llm


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose vocabulary has <think> and </think>, and whose chat template mentions them."""
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("thinker"))
    save_tokenizer(folder, "<think>", "</think>")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] += "{# <think> #}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def run(llm: LLM, prompt: Any = PROMPT, **params: Any) -> RequestOutput:
    options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    [output] = llm.generate(prompt, SamplingParams(**(options | params)), use_tqdm=False)
    return output


def test_only_allowed_tokens(llm: LLM) -> None:
    for options in ({}, {"temperature": 1.0, "seed": 3}, {"logit_bias": {41: 100.0}}, {"frequency_penalty": 1.0}):
        tokens = run(llm, max_tokens=60, allowed_token_ids=ALLOWED, **options).outputs[0].token_ids
        assert len(tokens) == 60 and set(tokens) <= set(ALLOWED)
        drafted = run(llm, max_tokens=60, allowed_token_ids=ALLOWED, speculative_tokens=4, **options)
        assert drafted.outputs[0].token_ids == tokens
    [entry] = run(llm, max_tokens=1, logprobs=-1).outputs[0].logprobs or []
    likeliest = max(ALLOWED, key=lambda token: entry[token].logprob)
    assert run(llm, max_tokens=1, allowed_token_ids=ALLOWED).outputs[0].token_ids == [likeliest]


def test_allowed_tokens_and_a_grammar(llm: LLM) -> None:
    a, b, c = (llm.tokenizer.encode(letter)[0] for letter in "abc")
    grammar = {"regex": "[ab]{6}"}
    for allowed, text in (([a, c], "aaaaaa"), ([b, c, 511], "bbbbbb")):
        assert run(llm, allowed_token_ids=allowed, structured_outputs=grammar).text == text
    with pytest.raises(InvalidRequest, match="no token is left"):
        run(llm, allowed_token_ids=[c], structured_outputs=grammar)
    assert run(llm, max_tokens=2).outputs[0].finish_reason == "length", "other requests go on"


@pytest.mark.parametrize("wrong", [[], [512], [-1], [1.5], 3, [True]])
def test_wrong_allowed_tokens(llm: LLM, wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="allowed_token_ids"):
        run(llm, allowed_token_ids=wrong)


def test_all_logprobs(llm: LLM, tiny_llama: Path) -> None:
    output = run(llm, max_tokens=3, logprobs=-1, prompt_logprobs=-1)
    few = run(llm, max_tokens=3, logprobs=5, prompt_logprobs=5)
    entries = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    for entry, part in zip(entries, [*(few.prompt_logprobs or [])[1:], *(few.outputs[0].logprobs or [])], strict=True):
        assert entry is not None and part is not None and len(entry) == 512
        assert {token: entry[token] for token in part} == part
        assert math.isclose(sum(math.exp(each.logprob) for each in entry.values()), 1, rel_tol=1e-4)
        assert sorted(each.rank for each in entry.values()) == list(range(1, 513))
    with LLM(str(tiny_llama)) as limited:
        for wanted in ({"logprobs": 21}, {"logprobs": -1}, {"prompt_logprobs": 21}, {"prompt_logprobs": -1}):
            with pytest.raises(InvalidRequest, match="max_logprobs"):
                run(limited, **wanted)
        assert run(limited, logprobs=20).outputs[0].logprobs


def test_logprobs_of_prompts_are_made_when_they_are_read(llm: LLM) -> None:
    known = run(llm, "one two three four", prompt_logprobs=2).prompt_logprobs
    assert known is not None and known[0] is None and known[-1] == list(known)[-1]
    assert known[1:3] == list(known)[1:3] and known == list(known) == known[:]
    assert known != list(known)[1:] and pickle.loads(pickle.dumps(known)) == known
    with pytest.raises(IndexError):
        known[len(known)]


def test_the_end_of_reasoning_is_forced(thinker: Path) -> None:
    with LLM(str(thinker)) as llm:
        start, end = (llm.tokenizer.special_id(mark) for mark in ("<think>", "</think>"))
        assert start is not None and end is not None
        prompt = [*llm.tokenizer.encode("word " * 20), start]
        free = run(llm, prompt, max_tokens=30, seed=1, temperature=1).outputs[0].token_ids
        assert end not in free
        options = {"max_tokens": 30, "seed": 1, "temperature": 1, "thinking_token_budget": 9}
        thought = run(llm, prompt, **options).outputs[0].token_ids
        assert thought[:9] == free[:9] and thought[9] == end and len(thought) == 30
        banned = run(llm, prompt, **options, logit_bias={end: -100.0}, bad_words=["</think>"]).outputs[0].token_ids
        assert banned[9] == end
        assert run(llm, prompt, **options | {"thinking_token_budget": -1}).outputs[0].token_ids == free
        for size in (9, 10):  # draft tokens do not skip the end
            same = {"max_tokens": 30, "thinking_token_budget": size, "logit_bias": {7: 100.0}}
            drafted = run(llm, prompt, **same, speculative_tokens=4).outputs[0].token_ids
            assert drafted == [7] * size + [end] + [7] * (29 - size)
        begun = run(llm, PROMPT, **options, logit_bias={start: 100.0}).outputs[0].token_ids
        assert begun[0] == start and begun[10] == end
        prompts = [[i, *prompt[-10 - 4 * i :]] for i in range(10)]
        long = options | {"max_tokens": 60}
        expected = [run(llm, each, **long).outputs[0].token_ids for each in prompts]
        assert all(end in tokens[:10] for tokens in expected)
    settings: dict[str, Any] = {"max_batch_tokens": 16, "speculative_tokens": 4, "max_model_len": 128}
    with LLM(str(thinker), **settings, kv_cache_memory="200KiB") as other:
        outputs = other.generate(prompts, SamplingParams(**long, ignore_eos=True), use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert other.stats().preemptions


def test_reasoning_that_must_end_within_a_character_ends_after_it(thinker: Path) -> None:
    """A grammar has whole characters, also in the reasoning before its constraint begins."""
    outputs = StructuredOutputs(choice=["yes", "no"], reasoning_end=["</think>"])
    with LLM(str(thinker)) as llm:
        start, end = (llm.tokenizer.special_id(mark) for mark in ("<think>", "</think>"))
        assert start is not None and end is not None
        [first, *_] = llm.tokenizer.encode("é", add_special_tokens=False)
        options: dict[str, Any] = {"temperature": 1, "max_tokens": 20, "ignore_eos": False, "thinking_token_budget": 3}
        options |= {"structured_outputs": outputs, "logit_bias": {first: 8.0}}
        within = 0
        for seed in range(20):
            [output] = run(llm, [start], **options, seed=seed).outputs
            at = output.token_ids.index(end)
            thought, answer = output.token_ids[:at], llm.tokenizer.decode(output.token_ids[at:])
            assert output.finish_reason == "stop" and answer.strip() in ("yes", "no"), output
            assert len(thought) in (3, 4) and "\ufffd" not in llm.tokenizer.decode(thought)
            within += len(thought) == 4
        assert within


def test_the_budget_of_reasoning_survives_crashes(thinker: Path) -> None:
    params = SamplingParams(max_tokens=60, seed=1, ignore_eos=True, thinking_token_budget=40)

    async def scenario() -> None:
        async with AsyncLLM(str(thinker)) as llm, asyncio.timeout(60):
            prompt = [*llm.tokenizer.encode("word " * 20), llm.tokenizer.special_id("<think>")]
            [undisturbed] = await llm.agenerate([prompt], params)
            tokens: list[int] = []
            async for increment in llm.stream(prompt, params):
                tokens += increment.outputs[0].token_ids
                if len(tokens) in (20, 42):  # before and after the forced token
                    os.kill(llm._frontend.replicas[0].link.pid, signal.SIGKILL)
            assert tokens == undisturbed.outputs[0].token_ids
            assert tokens[40] == llm.tokenizer.special_id("</think>")

    asyncio.run(scenario())


def test_a_budget_needs_marks_of_reasoning(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="thinking_token_budget"):
        run(llm, thinking_token_budget=3)


def test_a_repetition_ends_the_output(llm: LLM) -> None:
    same = {"logit_bias": {7: 100.0}, "max_tokens": 30}
    detection = {"max_pattern_size": 2, "min_count": 4}
    output = run(llm, **same, repetition_detection=detection).outputs[0]
    assert (output.token_ids, output.finish_reason) == ([7] * 4, "repetition")
    assert output.stop_reason == "repetition_detected" and output.text == llm.tokenizer.decode([7] * 4)
    assert len(run(llm, **same, min_tokens=11, repetition_detection=detection).outputs[0].token_ids) == 11
    pairs = run(llm, **same, repetition_detection={**detection, "min_pattern_size": 2}).outputs[0]
    assert pairs.token_ids == [7] * 8
    assert run(llm, **same, repetition_detection={}).outputs[0].finish_reason == "length"
    assert not llm.stats().running


def test_the_best_completions(llm: LLM) -> None:
    options = {"temperature": 1.0, "seed": 4, "max_tokens": 9}
    every = run(llm, n=6, logprobs=0, **options).outputs
    ranked = sorted(every, key=lambda each: -(each.cumulative_logprob or 0))
    output = run(llm, n=2, best_of=6, **options)
    assert [each.token_ids for each in output.outputs] == [each.token_ids for each in ranked[:2]]
    assert [each.index for each in output.outputs] == [0, 1]
    assert [each.cumulative_logprob for each in output.outputs] == [each.cumulative_logprob for each in ranked[:2]]
    assert output.outputs[0].logprobs is None
    state = llm.get_kv_cache_state(output.request_id)
    assert state.token_ids[-9:] == ranked[0].token_ids
    with pytest.raises(InvalidRequest, match="best_of"):
        next(llm.stream(PROMPT, SamplingParams(n=1, best_of=2)))
    final = SamplingParams(n=2, best_of=6, output_kind=RequestOutputKind.FINAL_ONLY, ignore_eos=True, **options)
    [streamed] = llm.stream(PROMPT, final)
    assert streamed.outputs == output.outputs
    with pytest.raises(InvalidRequest, match="best_of"):
        SamplingParams(n=3, best_of=2)


def test_kinds_of_outputs(llm: LLM) -> None:
    options = {"temperature": 0, "max_tokens": 10, "ignore_eos": True, "n": 2, "logprobs": 1}
    [whole] = llm.generate(PROMPT, SamplingParams(**options), use_tqdm=False)
    deltas = list(llm.stream(PROMPT, SamplingParams(**options)))
    cumulative = list(llm.stream(PROMPT, SamplingParams(**options, output_kind=RequestOutputKind.CUMULATIVE)))
    [final] = llm.stream(PROMPT, SamplingParams(**options, output_kind=RequestOutputKind.FINAL_ONLY))
    assert final.outputs == whole.outputs and final.finished
    for index in (0, 1):
        so_far = "", list[int]()
        steps = [each.outputs[0] for each in deltas if each.outputs[0].index == index]
        wholes = [each.outputs[0] for each in cumulative if each.outputs[0].index == index]
        for delta, total in zip(steps, wholes, strict=True):
            so_far = so_far[0] + delta.text, so_far[1] + delta.token_ids
            assert (total.text, total.token_ids) == so_far and len(total.logprobs or []) == len(total.token_ids)
        assert wholes[-1] == whole.outputs[index]
