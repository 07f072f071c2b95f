"""`echo` with `logprobs`, `prompt_logprobs` and `max_tokens: 0` of /v1/completions."""

import json
from typing import Any

import httpx
import openai
import pytest

from server_process import ServerProcess

PROMPT = [37 * i % 500 for i in range(40)]


def complete(client: openai.OpenAI, **body: Any) -> Any:
    options = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 3}
    return client.completions.create(**(options | body))  # type: ignore[call-overload]


@pytest.mark.parametrize("n", [1, 2])
def test_echo_with_logprobs(client: openai.OpenAI, n: int) -> None:
    plain = complete(client, logprobs=2, n=n, seed=1)
    echoed = complete(client, logprobs=2, n=n, seed=1, echo=True)
    for bare, choice in zip(plain.choices, echoed.choices, strict=True):
        assert choice.text.endswith(bare.text) and len(choice.text) > len(bare.text)
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(PROMPT) + 3
        assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
        assert all(logprob <= 0 for logprob in logprobs.token_logprobs[1:])
        assert logprobs.token_logprobs[len(PROMPT) :] == bare.logprobs.token_logprobs
        offsets = [0]
        for token in logprobs.tokens[:-1]:
            offsets.append(offsets[-1] + len(token))
        assert logprobs.text_offset == offsets
    nothing = complete(client, logprobs=2, echo=True, max_tokens=0).choices[0]
    assert nothing.logprobs.token_logprobs == echoed.choices[0].logprobs.token_logprobs[: len(PROMPT)]


def test_echo_with_logprobs_streamed(client: openai.OpenAI) -> None:
    whole = complete(client, logprobs=1, echo=True, n=2, seed=1)
    parts: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in complete(client, logprobs=1, echo=True, n=2, seed=1, stream=True):
        for choice in chunk.choices:
            parts[choice.index].append(choice)
    for choice in whole.choices:
        chunks = parts[choice.index]
        assert "".join(chunk.text for chunk in chunks) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [each for chunk in chunks if chunk.logprobs for each in getattr(chunk.logprobs, name)]
            assert joined == getattr(choice.logprobs, name)


def test_prompt_logprobs(server: ServerProcess, client: openai.OpenAI) -> None:
    echoed = complete(client, logprobs=1, echo=True).choices[0].logprobs
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    [choice] = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"]
    known = choice["prompt_logprobs"]
    assert known[0] is None
    assert [of[str(token)]["logprob"] for token, of in zip(PROMPT[1:], known[1:], strict=True)] == (
        echoed.token_logprobs[1 : len(PROMPT)]
    )
    assert {"logprob", "rank", "decoded_token"} == known[1][str(PROMPT[1])].keys()
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}) as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    streamed = [choice for event in events for choice in event["choices"] if "prompt_logprobs" in choice]
    assert [choice["prompt_logprobs"] for choice in streamed] == [known]


def test_too_many(server: ServerProcess) -> None:
    for body in ({"prompt": [[7] * 500] * 26}, {"prompt": [7] * 500, "n": 26}):
        reply = httpx.post(f"{server.url}/v1/completions", json={"max_tokens": 1, "prompt_logprobs": 20, **body})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_no_output(client: openai.OpenAI) -> None:
    reply = complete(client, max_tokens=0)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("", "length")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(PROMPT), 0)
