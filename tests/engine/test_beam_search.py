"""Beam search: the sequences of transformers; shared pages; the same to the bit beside others and after a crash."""

import asyncio
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo import LLM, AsyncLLM, BeamSearchOutput, BeamSearchParams, SamplingParams
from octavo.errors import InvalidRequest, RequestTimeout

PROMPT = [37 * i % 500 for i in range(70)]


@pytest.fixture(scope="module")
def enders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 40 end-of-sequence tokens, so that beams do end."""
    folder = tmp_path_factory.mktemp("enders") / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *range(300, 339)]}))
    return folder


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama)) as llm:
        yield llm


def plain(output: BeamSearchOutput) -> list[tuple[list[int], float, str | None]]:
    return [(each.tokens, each.cum_logprob, each.finish_reason) for each in output.sequences]


def test_against_transformers(enders: Path) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(enders, dtype=torch.float32).eval()
    prompts, finished = [PROMPT, PROMPT[:5]], 0
    with LLM(str(enders), backend="torch", dtype="float32") as llm:
        for width, length_penalty in ((2, 1.0), (4, 0.0), (5, 3.0), (5, -2.0)):
            params = BeamSearchParams(beam_width=width, max_tokens=10, length_penalty=length_penalty)
            for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
                found = model.generate(
                    torch.tensor([prompt]), num_beams=width, num_return_sequences=width, do_sample=False,
                    max_new_tokens=10, length_penalty=length_penalty, early_stopping="never", output_scores=True,
                    return_dict_in_generate=True, eos_token_id=[2, *range(300, 339)], pad_token_id=511,
                )  # fmt: skip
                for sequence, expected in zip(output.sequences, found.sequences.tolist(), strict=True):
                    assert sequence.tokens == expected[: len(sequence.tokens)]
                    assert set(expected[len(sequence.tokens) :]) <= {511}
                    finished += sequence.finish_reason == "stop"
                lengths = [len(each.tokens) - len(prompt) for each in output.sequences]
                sums = [each.cum_logprob for each in output.sequences]
                scores = [sum / length**length_penalty for sum, length in zip(sums, lengths, strict=True)]
                assert scores == pytest.approx(found.sequences_scores.tolist(), rel=1e-3, abs=1e-4)
    assert finished > 5, "beams must end too"


def test_text_and_logprobs(llm: LLM) -> None:
    [output] = llm.beam_search("The module", BeamSearchParams(beam_width=3, max_tokens=6))
    prompt = llm.tokenizer.encode("The module")
    assert len(output.sequences) == 3
    for sequence in output.sequences:
        assert sequence.text == llm.tokenizer.decode(sequence.tokens) and sequence.text.startswith("The module")
        chosen = sequence.tokens[len(prompt) :]
        total = sum(entry[token].logprob for token, entry in zip(chosen, sequence.logprobs, strict=True))
        assert total == pytest.approx(sequence.cum_logprob)
    [greedy] = llm.generate("The module", SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False)
    [narrow] = llm.beam_search("The module", BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True))
    assert narrow.sequences[0].tokens == prompt + greedy.outputs[0].token_ids


def test_beams_share_pages(llm: LLM) -> None:
    """Each round computes one token per beam, and the prompt is computed once."""
    before = llm.stats().tokens_computed
    width, rounds = 8, 40
    llm.beam_search(PROMPT[::-1], BeamSearchParams(beam_width=width, max_tokens=rounds, ignore_eos=True))
    computed = llm.stats().tokens_computed - before
    assert computed == len(PROMPT) + (rounds - 1) * width


def test_the_same_beside_other_requests(llm: LLM, tiny_llama: Path) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=20)
    prompts: list[Any] = [PROMPT, PROMPT[:40], "The class"]
    alone = [plain(llm.beam_search(prompt, params)[0]) for prompt in prompts]
    assert [plain(output) for output in llm.beam_search(prompts, params)] == alone
    noise = threading.Thread(
        target=lambda: llm.generate(
            [f"number {i}" for i in range(20)], SamplingParams(max_tokens=60, ignore_eos=True), use_tqdm=False
        )
    )
    noise.start()
    beside = [plain(output) for output in llm.beam_search(prompts, params)]
    noise.join()
    assert beside == alone
    settings: dict[str, Any] = {"enable_prefix_caching": False, "max_batch_tokens": 32, "max_batch_size": 3}
    with LLM(str(tiny_llama), **settings) as other:
        assert [plain(output) for output in other.beam_search(prompts, params)] == alone


def test_async_and_after_crashes(llm: LLM, tiny_llama: Path) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=200, ignore_eos=True)
    expected = plain(llm.beam_search(PROMPT, params)[0])

    async def scenario() -> None:
        # The queue has space for the beams of one search only.
        async with AsyncLLM(str(tiny_llama), max_batch_size=3, max_queue=0) as other, asyncio.timeout(60):
            search, killed = asyncio.ensure_future(other.beam_search(PROMPT, params)), set[int | None]()
            await asyncio.sleep(0)
            # With these, there are more completions than the queue takes. The search was admitted before.
            others = asyncio.ensure_future(other.agenerate("a", SamplingParams(n=2, max_tokens=400, ignore_eos=True)))
            while len(killed) < 2:
                await asyncio.sleep(0)
                link = other._frontend.replicas[0].link
                assert link is not None and not search.done()
                if other.readiness()[0] and link.pid not in killed and (await other.stats()).steps > 20:
                    killed.add(link.pid)
                    os.kill(link.pid or 0, signal.SIGKILL)
            assert plain((await search)[0]) == expected
            assert len((await others)[0].outputs) == 2

    asyncio.run(scenario())


def test_limits(llm: LLM) -> None:
    [output] = llm.beam_search([7] * 505, BeamSearchParams(beam_width=2, max_tokens=50, ignore_eos=True))
    assert [len(each.tokens) for each in output.sequences] == [512, 512]
    with pytest.raises(RequestTimeout):
        llm.beam_search(PROMPT, BeamSearchParams(beam_width=2, max_tokens=400, ignore_eos=True), timeout=0.01)
    for wrong in ({"beam_width": 0}, {"beam_width": 129}, {"max_tokens": 0}, {"length_penalty": float("nan")}):
        with pytest.raises(InvalidRequest):
            BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **wrong})
    assert not llm.stats().running
