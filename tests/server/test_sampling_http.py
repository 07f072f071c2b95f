"""vLLM's and OpenAI's further sampling fields over HTTP: token ids, ranks, beams, and the older form of tools."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo import LLM, BeamSearchParams, SamplingParams
from server_process import ServerProcess

PROMPT = [37 * i % 500 for i in range(40)]
CHAT = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama)) as llm:
        yield llm


def post(server: ServerProcess, path: str, body: dict[str, Any]) -> Any:
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60).json()


def complete(server: ServerProcess, **body: Any) -> Any:
    return post(server, "completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 6, **body})


def chat(server: ServerProcess, **body: Any) -> Any:
    return post(server, "chat/completions", {"messages": CHAT, "temperature": 0, "max_tokens": 6, **body})


def chunks(server: ServerProcess, path: str, body: dict[str, Any]) -> list[Any]:
    with httpx.stream("POST", f"{server.url}/v1/{path}", json={**body, "stream": True}) as reply:
        return [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]


def test_token_ids_of_completions(server: ServerProcess, llm: LLM) -> None:
    [expected] = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=6, n=2), use_tqdm=False)
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 6, "n": 2, "return_token_ids": True}
    for choice, completion in zip(complete(server, **body)["choices"], expected.outputs, strict=True):
        assert (choice["token_ids"], choice["prompt_token_ids"]) == (completion.token_ids, PROMPT)
    streamed: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in chunks(server, "completions", body):
        for choice in chunk["choices"]:
            streamed[choice["index"]].append(choice)
    for index, choices in streamed.items():
        assert [token for each in choices for token in each["token_ids"]] == expected.outputs[index].token_ids
        assert ["prompt_token_ids" in each for each in choices] == [True] + [False] * (len(choices) - 1)
    assert "token_ids" not in complete(server)["choices"][0]


def test_token_ids_of_chats(server: ServerProcess, llm: LLM) -> None:
    [expected] = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    reply = chat(server, return_token_ids=True)
    assert reply["prompt_token_ids"] == expected.prompt_token_ids
    assert reply["choices"][0]["token_ids"] == expected.outputs[0].token_ids
    body = {"messages": CHAT, "temperature": 0, "max_tokens": 6, "return_token_ids": True}
    events = chunks(server, "chat/completions", body)
    assert events[0]["prompt_token_ids"] == expected.prompt_token_ids
    assert not any("prompt_token_ids" in event for event in events[1:])
    ids = [token for event in events for choice in event["choices"] for token in choice.get("token_ids", [])]
    assert ids == expected.outputs[0].token_ids


def test_tokens_as_token_ids(server: ServerProcess) -> None:
    plain = complete(server, logprobs=2, echo=True, return_token_ids=True)["choices"][0]
    named = complete(server, logprobs=2, echo=True, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    ids = PROMPT + plain["token_ids"]
    assert named["tokens"] == [f"token_id:{token}" for token in ids]
    assert named["text_offset"] == plain["logprobs"]["text_offset"]
    assert named["token_logprobs"] == plain["logprobs"]["token_logprobs"]
    for token, logprob, top in list(zip(named["tokens"], named["token_logprobs"], named["top_logprobs"], strict=True))[
        1:
    ]:
        assert top[token] == logprob and all(name.startswith("token_id:") for name in top)
    body = {"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = chat(server, **body)["choices"][0]
    content = choice["logprobs"]["content"]
    assert [each["token"] for each in content] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(top["token"].startswith("token_id:") for each in content for top in each["top_logprobs"])


def test_restrictions(server: ServerProcess, client: openai.OpenAI) -> None:
    choice = complete(server, allowed_token_ids=[50, 60, 70], return_token_ids=True)["choices"][0]
    assert set(choice["token_ids"]) <= {50, 60, 70}
    detection = {"max_pattern_size": 3, "min_count": 5}
    choice = complete(server, logit_bias={"50": 100}, max_tokens=30, repetition_detection=detection)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("repetition", "repetition_detected")
    for wrong in (
        {"allowed_token_ids": []}, {"allowed_token_ids": [512]}, {"repetition_detection": {"max_pattern_size": 5}},
        {"repetition_detection": 3}, {"thinking_token_budget": 5}, {"logprobs": 21}, {"prompt_logprobs": -1},
        {"best_of": 129}, {"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}, {"length_penalty": 2.0},
    ):  # fmt: skip
        error = complete(server, **wrong)["error"]
        assert error["param"] in wrong or error["param"] == "min_count", wrong


def test_best_of(server: ServerProcess, client: openai.OpenAI) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "seed": 3, "logprobs": 1}
    every = client.completions.create(**body, n=5).choices  # type: ignore[call-overload]
    ranked = sorted(every, key=lambda choice: -sum(choice.logprobs.token_logprobs))
    best = client.completions.create(**body, n=2, best_of=5)  # type: ignore[call-overload]
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]


def test_beam_search(server: ServerProcess, llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=0.5)
    [expected] = llm.beam_search(PROMPT, params)
    body = {"n": 3, "use_beam_search": True, "length_penalty": 0.5, "logprobs": 2, "return_token_ids": True}
    reply = complete(server, **body)
    for choice, sequence in zip(reply["choices"], expected.sequences, strict=True):
        assert PROMPT + choice["token_ids"] == sequence.tokens
        assert choice["text"] == llm.tokenizer.decode(choice["token_ids"])
        assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(sequence.cum_logprob)
        assert all(2 <= len(top) <= 3 for top in choice["logprobs"]["top_logprobs"])
    assert reply["usage"]["completion_tokens"] == 18 and reply["usage"]["prompt_tokens"] == len(PROMPT)
    chunk = chunks(server, "completions", {"prompt": PROMPT, "max_tokens": 6, **body})[0]
    assert chunk["choices"][0]["text"] == reply["choices"][0]["text"]
    answer = chat(server, n=2, use_beam_search=True)
    [expected] = llm.beam_search([llm.chat_tokens(CHAT)], BeamSearchParams(beam_width=2, max_tokens=6))
    prompt = len(llm.chat_tokens(CHAT))
    texts = [llm.tokenizer.decode(sequence.tokens[prompt:]) for sequence in expected.sequences]
    assert [choice["message"]["content"] for choice in answer["choices"]] == texts
    for wrong in ({"stop": "a"}, {"logit_bias": {"1": 1}}, {"response_format": {"type": "json_object"}}):
        error = complete(server, use_beam_search=True, **wrong)["error"]
        assert error["type"] == "invalid_request_error"
    assert complete(server, use_beam_search=True, stop=[], top_p=0.9, seed=3)["choices"]
