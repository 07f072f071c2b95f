"""Same request, same tokens and logprobs, to the bit: alone, batched, in any order, in chunks, cached, preempted."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from octavo import LLM, RequestOutput, SamplingParams
from octavo.outputs import Logprob
from tiny_models import real_text

NUM_PROMPTS = 64
# Without --many, for SmolLM2, whose tokens take long on a processor without AVX-512. The first seven are the long ones.
SAMPLE = [2, 6, 10, 14, 18, 22, 26, 0, 1, 3, 4, 5, 9]
ITEM = {
    "type": "object",
    "properties": {"a": {"enum": [1, 22, "333"]}},
    "required": ["a"],
    "additionalProperties": False,
}
GRAMMARS = [
    {"json": {"type": "array", "items": ITEM, "minItems": 2, "maxItems": 9}, "disable_additional_properties": True},
    {"regex": "([a-z]+ ){4,9}(end|stop)"},
    {"grammar": 'start: call (";" call){3,6}\ncall: /[a-z]{2,5}/ "(" /\\d{1,3}/? ")"'},
]
PAGES = 10  # of a KV pool that is too small for the prompts
# The tiny ones have sliding windows, biases, norms of q and k. SmolLM2's own integers ("auto") are those of Q4_1.
# The last is the KV cache's dtype.
MODELS = [
    ("smollm2", "none", "bf16"), ("smollm2", "auto", "int8"), ("mistral", "none", "bf16"), ("mistral", "8bit", "int8"),
    ("qwen2", "none", "int8"), ("qwen2", "8bit", "bf16"), ("qwen3", "none", "bf16"), ("qwen3", "4bit", "bf16"),
]  # fmt: skip


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[list[tuple[int, float, int]]]
    prompt_logprobs: list[list[tuple[int, float, int]]]


def answer(output: RequestOutput, index: int = 0) -> Answer:
    completion = output.outputs[index]
    assert completion.logprobs is not None
    return Answer(completion.token_ids, plain(completion.logprobs), plain(output.prompt_logprobs or []))


def plain(logprobs: Sequence[dict[int, Logprob] | None]) -> list[list[tuple[int, float, int]]]:
    return [[(token, lp.logprob, lp.rank) for token, lp in (entry or {}).items()] for entry in logprobs]


@dataclass(frozen=True)
class Cases:
    """Prompts of 3 to 180 tokens, and the answer to each when it is all there is."""

    prompts: list[list[int]]
    params: list[SamplingParams]
    answers: list[Answer]


def parameters(i: int, longest: int) -> SamplingParams:
    """Greedy and seeded by turns; some with penalties, a grammar, or logprobs of the prompt; some outgrow a page."""
    penalty = 0.5 if i % 8 == 3 else 0.0
    return SamplingParams(
        temperature=0.9 * (i % 2), top_p=0.95, top_k=50 * (i % 3), seed=i, frequency_penalty=penalty, logprobs=3,
        max_tokens=longest if i % 4 == 2 else 12 + i % 7, ignore_eos=True, prompt_logprobs=2 if i % 5 == 4 else None,
        structured_outputs=GRAMMARS[i // 4 % 3] if i % 4 == 1 else None,
    )  # fmt: skip


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> dict[str, str]:
    """What of an LLM's settings names the model and its recipe."""
    name, quantization, kv_cache_dtype = request.param
    path = name if name == "smollm2" else str(tiny_model(name))
    return {"model": path, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}


@pytest.fixture(scope="module")
def cases(model: dict[str, str], many: bool) -> Cases:
    rng = random.Random(0)
    with LLM(**model, enable_prefix_caching=False) as llm:
        text = llm.tokenizer.encode(real_text()[:60000])
        prompts = []
        for _ in range(NUM_PROMPTS):
            start, length = rng.randrange(10000), rng.choice([3, 17, 32, 33, 64, 100, 180])
            prompts.append(text[start : start + length])
        params = [parameters(i, longest=80) for i in range(NUM_PROMPTS)]
        if model["model"] == "smollm2" and not many:
            prompts = [prompts[i] for i in SAMPLE]
            params = [parameters(i, longest=40) for i in SAMPLE]
        pairs = zip(prompts, params, strict=True)
        return Cases(prompts, params, [answer(llm.generate(prompt, one)[0]) for prompt, one in pairs])


def run(llm: LLM, cases: Cases) -> list[Answer]:
    return [answer(output) for output in llm.generate(cases.prompts, cases.params)]


def test_batched(model, cases):
    with LLM(**model) as llm:
        assert run(llm, cases) == cases.answers


def test_in_another_order(model, cases):
    order = random.Random(1).sample(range(len(cases.prompts)), len(cases.prompts))
    with LLM(**model, max_batch_size=len(order) // 3) as llm:
        outputs = llm.generate([cases.prompts[i] for i in order], [cases.params[i] for i in order])
    assert [answer(output) for output in outputs] == [cases.answers[i] for i in order]


@pytest.mark.parametrize("chunk", [16, 512])
def test_in_chunks(model, cases, chunk):
    with LLM(**model, max_batch_tokens=chunk) as llm:
        assert run(llm, cases) == cases.answers


def test_with_draft_tokens(model, cases):
    with LLM(**model, speculative_tokens=4) as llm:
        assert run(llm, cases) == cases.answers
        assert llm.stats().accepted_tokens > 0


def test_from_the_prefix_cache(model, cases):
    with LLM(**model) as llm:
        llm.generate(cases.prompts, SamplingParams(max_tokens=1))
        outputs = llm.generate(cases.prompts, cases.params)
    assert sum(output.metrics.cached_tokens for output in outputs) > 15 * len(cases.prompts)
    assert [answer(output) for output in outputs] == cases.answers


def test_after_preemption(model, cases):
    with LLM(**model, max_model_len=288, kv_cache_memory=pool_of(model)) as llm:
        for _ in range(5):  # on a busy machine, sequences may wait for masks until others have ended
            assert run(llm, cases) == cases.answers
            stats = llm.stats()
            if stats.preemptions:
                break
    assert stats.preemptions > 0
    assert stats.free_pages + stats.cached_pages == stats.num_pages == PAGES


def test_after_swapping_to_disk(model, cases, tmp_path):
    disk = {"kv_disk": str(tmp_path), "preemption": "swap", "max_model_len": 288}
    with LLM(**model, **disk, kv_cache_memory=pool_of(model)) as llm:
        assert run(llm, cases) == cases.answers
        assert run(llm, cases) == cases.answers, "with prompts from the disk"
        stats = llm.stats()
    assert stats.preemptions > 0
    assert stats.free_pages + stats.cached_pages == stats.num_pages == PAGES
    fetched = [stats.pages_fetched]
    with LLM(**model, **disk) as llm:
        assert run(llm, cases) == cases.answers, "in another engine"
        fetched.append(llm.stats().pages_fetched)
    if model["model"] == "smollm2":  # the others are so small that to compute is quicker
        assert min(fetched) > 10


def test_the_next_turn_of_a_conversation(model, cases):
    turns = zip(cases.prompts[:16], cases.answers[:16], strict=True)
    longer, params = [[*prompt, *first.tokens, 5, 6, 7] for prompt, first in turns], cases.params[:16]
    with LLM(**model, enable_prefix_caching=False) as llm:
        recomputed = [answer(output) for output in llm.generate(longer, params)]
    with LLM(**model) as llm:
        run(llm, cases)
        outputs = llm.generate(longer, params)
    unscored = [output for output in outputs if output.prompt_logprobs is None]
    assert all(output.metrics.cached_tokens == len(output.prompt_token_ids) - 4 for output in unscored)
    assert [answer(output) for output in outputs] == recomputed


def test_with_larger_pages(model, cases):
    with LLM(**model, kv_cache_page_size=96) as llm:
        assert run(llm, cases) == cases.answers


def test_with_one_thread(model, cases):
    with LLM(**model, threads=1) as llm:
        assert run(llm, cases) == cases.answers


def test_as_one_of_n(model, cases):
    """Completion i of n is what a request of seed + i gets."""
    with LLM(**model) as llm:
        for i in (1, 5, 7):
            params = cases.params[i]
            for k in (0, 2):
                shifted = {name: getattr(params, name) for name in params.__struct_fields__}
                shifted |= {"n": 3, "seed": params.seed - k}
                output = llm.generate(cases.prompts[i], SamplingParams(**shifted))[0]
                assert answer(output, k) == cases.answers[i]


def pool_of(model: dict[str, str]) -> int:
    """Bytes of a KV pool of PAGES pages of 32 tokens."""
    with LLM(**model, max_model_len=32) as llm:
        return PAGES * llm._frontend.replicas[0].link.engine.backend.page_bytes
