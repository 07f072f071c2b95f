"""Embeddings: against transformers; the same bits alone, in a batch, in chunks, after cache hits and crashes."""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from octavo import LLM, AsyncLLM, PoolingParams, SamplingParams
from octavo.config import EngineConfig
from octavo.engine.loading import load_engine
from octavo.engine.messages import EngineRequest, Pooling
from octavo.errors import InvalidRequest, PromptTooLong, RequestTimeout
from octavo.text import Tokenizer
from tiny_models import real_text

LENGTHS = [1, 2, 31, 32, 33, 64, 100, 180]
MODELS = [
    ("mistral", "8bit", "bf16"),
    ("qwen2", "none", "int8"),
    ("qwen3", "4bit", "bf16"),
]
MEAN, LAST = PoolingParams(pooling="mean", normalize=False), PoolingParams(normalize=False)


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> dict[str, str]:
    name, quantization, kv_cache_dtype = request.param
    return {"model": str(tiny_model(name)), "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}


@pytest.fixture(scope="module")
def prompts(model: dict[str, str]) -> list[list[int]]:
    text = Tokenizer.load(Path(model["model"])).encode(real_text()[:8000])
    return [text[100 * i : 100 * i + length] for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def alone(model: dict[str, str], prompts: list[list[int]]) -> dict[str, list[bytes]]:
    with LLM(**model, enable_prefix_caching=False) as llm:
        return {params.pooling: [embedded(llm, [prompt], params)[0] for prompt in prompts] for params in (MEAN, LAST)}


def embedded(llm: LLM, prompts: list[list[int]], params: PoolingParams) -> list[bytes]:
    """The bits of the embedding of each prompt."""
    return [output.outputs.data.tobytes() for output in llm.encode(prompts, params)]


@pytest.mark.parametrize("params", [MEAN, LAST], ids=["mean", "last"])
class TestTheBitsAreThoseOfThePromptAlone:
    def test_in_a_batch_twice(self, model, prompts, alone, params) -> None:
        with LLM(**model) as llm:
            assert embedded(llm, prompts, params) == alone[params.pooling]
            assert embedded(llm, prompts[::-1], params) == alone[params.pooling][::-1], "with all pages in the cache"

    @pytest.mark.parametrize("chunk", [16, 37])
    def test_in_chunks(self, model, prompts, alone, params, chunk) -> None:
        with LLM(**model, max_batch_tokens=chunk, max_batch_size=3) as llm:
            assert embedded(llm, prompts, params) == alone[params.pooling]

    def test_beside_generation(self, model, prompts, alone, params) -> None:
        """Some streams decode, with drafts and logprobs of prompts; their tokens do not change either."""
        generated = SamplingParams(max_tokens=20, seed=1, ignore_eos=True, prompt_logprobs=1, speculative_tokens=4)

        async def scenario() -> None:
            with LLM(**model, max_batch_tokens=48) as llm:
                expected = await llm.agenerate(prompts[:4], generated)
                beside = asyncio.ensure_future(llm.agenerate(prompts[:4], generated))
                assert await asyncio.to_thread(embedded, llm, prompts, params) == alone[params.pooling]
                for output, known in zip(await beside, expected, strict=True):
                    assert output.outputs[0].token_ids == known.outputs[0].token_ids
                    assert output.prompt_logprobs == known.prompt_logprobs

        asyncio.run(scenario())


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("hidden", ["mean", "last"])
def test_preempted_after_any_step(tiny_llama: Path, hidden: Literal["mean", "last"], caching: bool) -> None:
    """With its pages in the cache, it takes no more steps. Without, its tokens are computed, but not added, twice."""
    prompt = [43 * i % 500 for i in range(100)]
    settings = {"max_batch_tokens": 16, "max_batch_size": 4, "enable_prefix_caching": caching}
    engine = load_engine(EngineConfig.from_keywords(model=str(tiny_llama), **settings), tiny_llama)

    def run(preempt_after: int) -> tuple[bytes | None, int]:
        """Return the vector, and the number of steps that it took."""
        params, salt = SamplingParams(max_tokens=1), str(preempt_after)
        engine.add(EngineRequest("a", prompt, params, salt=salt, pooling=Pooling(hidden)))
        for steps in range(1, 50):
            if outputs := engine.step():
                return outputs[0].pooled, steps
            if steps == preempt_after:
                engine.scheduler._preempt(next(iter(engine.scheduler.running)))
        raise AssertionError("it does not end")

    expected = run(0)
    assert expected[0] is not None and expected[1] == 7
    for preempt_after in range(1, 7):
        assert run(preempt_after) == (expected[0], expected[1] + (0 if caching else preempt_after))
    assert engine.stats().free_pages + engine.stats().cached_pages == engine.stats().num_pages
    engine.close()


def reference(folder: Path, prompts: list[list[int]]) -> dict[str, list[np.ndarray]]:
    """The mean of the hidden states after the final norm, and that of the last token, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.inference_mode():
        hidden = [model(torch.tensor([each]), output_hidden_states=True).hidden_states[-1][0] for each in prompts]
    return {"mean": [each.mean(dim=0).numpy() for each in hidden], "last": [each[-1].numpy() for each in hidden]}


def test_a_checkpoint_without_a_head(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Its tensors have names without "model.", as in Qwen3-Embedding."""
    whole, folder = tiny_model("qwen3"), tmp_path / "decoder"
    shutil.copytree(whole, folder)
    weights = load_file(whole / "model.safetensors")
    save_file({name.removeprefix("model."): weight for name, weight in weights.items()}, folder / "model.safetensors")
    vectors = []
    for path in (whole, folder):
        with LLM(str(path)) as llm:
            vectors.append(llm.embed("The module")[0].outputs.embedding)
    assert vectors[0] == vectors[1]


@pytest.mark.parametrize("backend, dtype, tolerance", [("torch", "float32", 1e-4), ("cpu", "auto", 0.02)])
def test_they_are_those_of_transformers(tiny_llama: Path, backend: str, dtype: str, tolerance: float) -> None:
    prompts = [[37 * i % 500 for i in range(length)] for length in (1, 50, 120)]
    expected = reference(tiny_llama, prompts)
    with LLM(str(tiny_llama), backend=backend, dtype=dtype, max_batch_tokens=64) as llm:
        for params in (MEAN, LAST):
            for output, known in zip(llm.encode(prompts, params), expected[params.pooling], strict=True):
                error = np.linalg.norm(output.outputs.data - known) / np.linalg.norm(known)
                assert error < tolerance, params.pooling


def test_normalized_with_fewer_dimensions_and_truncated_prompts(llm: LLM) -> None:
    prompt = [37 * i % 500 for i in range(80)]
    [raw], [whole] = llm.encode(prompt, LAST), llm.embed(prompt)
    data = raw.outputs.data.astype(np.float64)
    assert whole.outputs.embedding == pytest.approx(data / np.linalg.norm(data), abs=1e-6)
    assert whole.outputs.hidden_size == llm.info.hidden_size == 96
    [short] = llm.embed(prompt, pooling_params=PoolingParams(dimensions=10))
    assert short.outputs.embedding == pytest.approx(data[:10] / np.linalg.norm(data[:10]), abs=1e-6)
    [cut] = llm.embed([prompt], pooling_params=PoolingParams(truncate_prompt_tokens=30))
    [same] = llm.embed([prompt[-30:]])
    assert cut.outputs == same.outputs and cut.prompt_token_ids == prompt[-30:]
    [text] = llm.embed("some text about modules", use_tqdm=False)
    [tokens] = llm.embed({"prompt_token_ids": text.prompt_token_ids}, tenant="another")
    assert tokens.outputs == text.outputs


def test_the_cache_serves_the_last_token_but_not_the_mean(tiny_llama: Path) -> None:
    prompt = [41 * i % 500 for i in range(100)]
    with LLM(str(tiny_llama)) as llm:
        [first] = llm.embed(prompt)
        [again] = llm.embed(prompt)
        [mean] = llm.embed(prompt, pooling_params=PoolingParams(pooling="mean"))
        [generated] = llm.generate(prompt, SamplingParams(max_tokens=1))
    assert (first.num_cached_tokens, again.num_cached_tokens, mean.num_cached_tokens) == (0, 99, 0)
    assert generated.num_cached_tokens == 99, "an embedding's pages are those of a generation"
    assert again.outputs == first.outputs != mean.outputs


@pytest.mark.parametrize(
    "prompt, params, error",
    [
        ([], {}, InvalidRequest),
        ("", {}, InvalidRequest),
        ([5] * 512, {}, PromptTooLong),
        ([512], {}, InvalidRequest),
        ([5], {"dimensions": 97}, InvalidRequest),
        ([5], {"dimensions": 0}, InvalidRequest),
        ([5], {"pooling": "max"}, InvalidRequest),
        ([5], {"normalize": 1}, InvalidRequest),
        ([5], {"truncate_prompt_tokens": -2}, InvalidRequest),
    ],
)
def test_what_is_refused(llm: LLM, prompt: list[int], params: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        llm.embed([prompt], pooling_params=PoolingParams(**params))  # type: ignore[arg-type]


def test_other_tasks_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="pooling_task must be embed"):
        llm.encode([5], pooling_task="token_embed")


def test_a_timeout_and_an_abort_free_everything(tiny_llama: Path) -> None:
    async def scenario() -> None:
        async with AsyncLLM(str(tiny_llama), max_batch_tokens=16) as llm, asyncio.timeout(60):
            with pytest.raises(RequestTimeout):
                await llm.embed([[5] * 400] * 50, pooling_params=MEAN, timeout=0.001)
            aborted = asyncio.ensure_future(llm.embed([[6] * 400] * 50, pooling_params=MEAN))
            await asyncio.sleep(0)
            aborted.cancel()
            [_] = await llm.embed([7, 8, 9])
            stats = await llm.stats()
            assert (stats.running, stats.waiting, llm.frontend_stats().live) == (0, 0, 0)
            assert stats.free_pages + stats.cached_pages == stats.num_pages

    asyncio.run(scenario())


@pytest.mark.parametrize("params", [MEAN, LAST], ids=["mean", "last"])
def test_after_a_crash(tiny_llama: Path, params: PoolingParams) -> None:
    """The engine is killed while it computes them: the next one computes the same bits."""
    prompts = [[(37 + i) * k % 500 for k in range(300)] for i in range(8)]

    async def scenario() -> None:
        async with AsyncLLM(str(tiny_llama), max_batch_tokens=16) as llm, asyncio.timeout(60):
            expected = [output.outputs.data for output in await llm.encode(prompts, params, cache_salt="a")]
            running = asyncio.ensure_future(llm.encode(prompts, params, cache_salt="b"))
            while not 0 < len(llm._frontend._ledger or ()) < len(prompts):
                await asyncio.sleep(0.001)
            link = llm._frontend.replicas[0].link
            assert link is not None and link.pid is not None
            os.kill(link.pid, signal.SIGKILL)
            for output, known in zip(await running, expected, strict=True):
                np.testing.assert_array_equal(output.outputs.data, known)

    asyncio.run(scenario())
