"""Parameters that change what of the output becomes text, what the prompt is, and which tokens are banned."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo import LLM, RequestOutput, SamplingParams
from octavo.errors import InvalidRequest
from server_process import ServerProcess

PROMPT = "The module"
SPECIAL = {1: 100.0}  # <|im_start|> at every step


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama)) as llm:
        yield llm


def run(llm: LLM, prompt: str | list[int] = PROMPT, **params: Any) -> RequestOutput:
    options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    [output] = llm.generate(prompt, SamplingParams(**(options | params)), use_tqdm=False)
    return output


def test_special_tokens(llm: LLM) -> None:
    assert run(llm, logit_bias=SPECIAL).text == ""
    assert run(llm, logit_bias=SPECIAL, skip_special_tokens=False).text == "<|im_start|>" * 12


def test_the_stop_is_part_of_the_text_if_wanted(llm: LLM) -> None:
    text = run(llm).text
    stop = text[4:7]
    before = text[: text.index(stop)]
    assert run(llm, stop=stop).text == before
    assert run(llm, stop=stop, include_stop_str_in_output=True).text == before + stop
    tokens = run(llm).outputs[0].token_ids
    without = run(llm, stop_token_ids=[tokens[5]])
    including = run(llm, stop_token_ids=[tokens[5]], include_stop_str_in_output=True)
    assert including.outputs[0].token_ids == without.outputs[0].token_ids
    assert including.text == without.text + llm.tokenizer.token_text(tokens[5])


def test_no_text(llm: LLM) -> None:
    whole, bare = run(llm), run(llm, detokenize=False)
    assert (bare.text, bare.outputs[0].token_ids) == ("", whole.outputs[0].token_ids)
    with pytest.raises(InvalidRequest, match="detokenize"):
        SamplingParams(detokenize=False, stop="a")


def test_truncated_prompts(llm: LLM) -> None:
    ids = llm.tokenizer.encode("word " * 600)
    for prompt in ("word " * 600, ids):
        last = run(llm, prompt, truncate_prompt_tokens=7)
        assert last.prompt_token_ids == ids[-7:]
        assert last.outputs[0].token_ids == run(llm, ids[-7:]).outputs[0].token_ids
        fitting = run(llm, prompt, truncate_prompt_tokens=-1)
        assert fitting.prompt_token_ids == ids[-500:] and len(fitting.outputs[0].token_ids) == 12
    assert run(llm, truncate_prompt_tokens=400).text == run(llm).text
    for wrong in (0, -2, 1.5):
        with pytest.raises(InvalidRequest, match="truncate_prompt_tokens"):
            SamplingParams(truncate_prompt_tokens=wrong)  # type: ignore[arg-type]


def test_bad_words(llm: LLM) -> None:
    text, tokens = run(llm, max_tokens=60).text, run(llm, max_tokens=60).outputs[0].token_ids
    pair = llm.tokenizer.decode(tokens[3:5]).strip()
    words = [text.split()[1], pair]
    assert all(word in text for word in words)
    spelled = [llm.tokenizer.encode(space + word, add_special_tokens=False) for word in words for space in ("", " ")]
    for options in ({}, {"temperature": 1.0, "seed": 3}, {"speculative_tokens": 4}):
        found = run(llm, max_tokens=60, bad_words=words, **options).outputs[0].token_ids
        for banned in spelled:
            assert all(found[i : i + len(banned)] != banned for i in range(len(found)))
    for wrong in ("one", [""], ["w"] * 129, ["w" * 1024] * 5):
        with pytest.raises(InvalidRequest, match="bad_words"):
            SamplingParams(bad_words=wrong)  # type: ignore[arg-type]


def test_over_http(server: ServerProcess) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    special = {"logit_bias": {"1": 100}, "skip_special_tokens": False, "bad_words": ["none"]}
    reply = httpx.post(f"{server.url}/v1/completions", json=body | special).json()
    assert reply["choices"][0]["text"] == "<|im_start|>" * 8
    chat = {"messages": [{"role": "user", "content": "word " * 600}], "truncate_prompt_tokens": 20, "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=chat).json()["usage"]["prompt_tokens"] == 20
