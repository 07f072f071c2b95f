"""Logprobs of prompts: against transformers, with n completions, after a crash, and prompts without output."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo import LLM, AsyncLLM, RequestOutput, SamplingParams

PROMPT = [37 * i % 500 for i in range(100)]
WANTED = SamplingParams(prompt_logprobs=3, max_tokens=2, seed=1, ignore_eos=True)


def reference(folder: Path, prompt: list[int]) -> torch.Tensor:
    """Return the logprobs at each position, [tokens, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), -1)


@pytest.mark.parametrize("settings", [{}, {"max_batch_size": 1, "max_batch_tokens": 32}])
def test_they_are_those_of_transformers(tiny_llama: Path, settings: dict[str, int]) -> None:
    expected = reference(tiny_llama, PROMPT)
    with LLM(str(tiny_llama), **settings) as llm:
        [output] = llm.generate(PROMPT, WANTED)
        [again] = llm.generate(PROMPT, WANTED)
    known = output.prompt_logprobs
    assert known is not None and again.prompt_logprobs == known, "although all pages were cached"
    assert known[0] is None and len(known) == len(PROMPT)
    differences = []
    for position, (token, entries) in enumerate(zip(PROMPT[1:], known[1:], strict=True)):
        assert entries is not None and next(iter(entries)) == token
        assert len(entries) == (3 if entries[token].rank <= 3 else 4)
        assert [entry.rank for entry in list(entries.values())[1:]] == [
            rank for rank in (1, 2, 3) if rank != entries[token].rank
        ]
        differences.append(abs(entries[token].logprob - expected[position, token].item()))
    assert sum(differences) / len(differences) < 0.02


def test_the_first_of_several_completions_computes_them(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama)) as llm:
        [alone] = llm.generate(PROMPT, WANTED)
        [several] = llm.generate(PROMPT, SamplingParams(n=3, prompt_logprobs=3, max_tokens=2, seed=1, ignore_eos=True))
        assert several.prompt_logprobs == alone.prompt_logprobs
        [one] = llm.generate([7], WANTED)
        assert one.prompt_logprobs == [None]


def test_no_output(tiny_llama: Path) -> None:
    """max_tokens 0 computes the prompt, and its logprobs if wanted."""
    params = SamplingParams(max_tokens=0, n=2, prompt_logprobs=0, logprobs=1)
    with LLM(str(tiny_llama)) as llm:
        [output] = llm.generate(PROMPT, params)
        [later] = llm.generate(PROMPT, SamplingParams(max_tokens=1))
    for completion in output.outputs:
        assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [], "length")
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(PROMPT)
    assert later.num_cached_tokens >= 96


def test_after_a_crash(tiny_llama: Path) -> None:
    """Killed before and after the prompt is computed: the same logprobs, once."""
    params = SamplingParams(prompt_logprobs=1, max_tokens=60, seed=1, ignore_eos=True)

    async def scenario() -> None:
        async with AsyncLLM(str(tiny_llama), max_batch_tokens=16) as llm, asyncio.timeout(60):

            def kill() -> None:
                link = llm._frontend.replicas[0].link
                assert link is not None and link.pid is not None
                os.kill(link.pid, signal.SIGKILL)

            async def one() -> RequestOutput:
                [output] = await llm.agenerate(PROMPT, params)
                return output

            expected = await one()
            early = asyncio.ensure_future(one())
            await asyncio.sleep(0)
            kill()
            outputs = [await early]
            late = asyncio.ensure_future(one())
            while not any(live.num_tokens for live in llm._frontend._ledger or ()):
                await asyncio.sleep(0.001)
            kill()
            outputs.append(await late)
            for output in outputs:
                assert output.outputs[0].token_ids == expected.outputs[0].token_ids
                assert output.prompt_logprobs == expected.prompt_logprobs

    asyncio.run(scenario())
