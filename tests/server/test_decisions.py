"""/v1/decisions with OpenAI's client; the probabilities against logprobs of the same chats."""

import math
from typing import Any

import httpx
import openai
import pytest

from server_process import ServerProcess

INPUT = "I was charged twice."
PREDICATE = {"type": "predicate", "name": "angry", "instructions": "The customer is angry."}
CHOICE = {
    "type": "choice",
    "instructions": "What is it about?",
    "choices": [{"value": "true"}, {"value": True, "description": "the truth"}, {"value": "other"}],
}
SCORE = {"type": "score", "name": "tone", "instructions": "Rate it.", "levels": [{"label": "low"}, {"label": "high"}]}
RULE = "Answer with the letter of one option, and nothing else."


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def expected(server: ServerProcess, messages: list[dict[str, str]], question: str, letters: str) -> list[float]:
    """The probabilities of letters after a question, from the logprobs of chats that can answer nothing else."""
    chat = [*messages, {"role": "user", "content": f"{question}\n{RULE}"}]
    weights = []
    for letter in letters:
        [token] = httpx.post(f"{server.url}/tokenize", json={"prompt": letter}).json()["tokens"][-1:]
        body = {"messages": chat, "max_tokens": 1, "logprobs": True, "allowed_token_ids": [token]}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
        weights.append(math.exp(reply["choices"][0]["logprobs"]["content"][0]["logprob"]))
    return [weight / sum(weights) for weight in weights]


def test_answers_in_the_order_of_the_questions(client: openai.OpenAI, server: ServerProcess) -> None:
    questions: Any = [PREDICATE, CHOICE, SCORE]
    decision = client.decisions.create(model="tiny", input=INPUT, questions=questions)
    angry, topic, tone = decision.answers
    user = [{"role": "user", "content": INPUT}]
    known = expected(server, user, "The customer is angry.\nA. true\nB. false", "AB")
    assert (angry.type, angry.name) == ("predicate", "angry")
    assert angry.probability == pytest.approx(known[0], abs=1e-5)
    known = expected(server, user, 'What is it about?\nA. "true"\nB. true (the truth)\nC. "other"', "ABC")
    assert topic.type == "choice" and topic.name is None
    assert [each.probability for each in topic.probabilities] == pytest.approx(known, abs=1e-5)
    assert [each.value for each in topic.probabilities] == ["true", True, "other"]
    assert topic.choice == topic.probabilities[known.index(max(known))].value
    assert topic.confidence == pytest.approx(max(known), abs=1e-5)
    known = expected(server, user, "Rate it.\nA. low\nB. high", "AB")
    assert tone.type == "score" and tone.score == pytest.approx(known[1], abs=1e-5)
    assert [(each.label, each.value) for each in tone.probabilities] == [("low", 0), ("high", 1)]
    assert decision.usage.output_tokens == 0 < decision.usage.input_tokens
    again = client.decisions.create(model="tiny", input=INPUT, questions=questions[::-1])
    assert again.answers == decision.answers[::-1], "the bits do not depend on the other questions"


def test_messages_and_json(client: openai.OpenAI, server: ServerProcess) -> None:
    parts: Any = [{"type": "input_text", "text": "Look:"}, {"type": "input_json", "data": {"city": "Tromsø"}}]
    messages: Any = [{"role": "developer", "content": "Be fair."}, {"role": "user", "content": parts}]
    question = PREDICATE | {"instructions": [{"type": "input_json", "data": [{"a": 1}]}]}
    decision = client.decisions.create(model="tiny", input=messages, questions=[question])  # type: ignore[list-item]
    chat = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": 'Look:\n{"city": "Tromsø"}'}]
    [answer] = decision.answers
    known = expected(server, chat, '[{"a": 1}]\nA. true\nB. false', "AB")
    assert answer.probability == pytest.approx(known[0], abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"questions": []}, "questions should not be empty"),
        ({"questions": [PREDICATE] * 401}, "400"),
        ({"questions": [{"type": "guess", "instructions": "x"}]}, "predicate"),
        ({"questions": [CHOICE | {"choices": [{"value": "a"}, {"value": "a"}]}]}, "two choices of the same value"),
        ({"questions": [CHOICE | {"choices": [{"value": "a"}]}]}, "at least 2"),
        ({"questions": [CHOICE | {"choices": [{"value": str(i)} for i in range(255)]}]}, "can name"),
        ({"questions": [SCORE | {"levels": "high"}]}, "levels"),
        ({"questions": [PREDICATE | {"instructions": [{"type": "input_image"}]}]}, "parts of text or JSON"),
        ({"questions": [PREDICATE | {"instructions": "x" * 100_000}]}, "context"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "only text"),
        ({"input": "x" * 40_000, "questions": [PREDICATE] * 400}, "the prompts of all questions"),
        ({"input": None}, "input"),
        ({"choices": [1]}, "choices"),
    ],
)
def test_what_is_refused(server: ServerProcess, wrong: dict[str, Any], reason: str) -> None:
    body = {"model": "tiny", "input": INPUT, "questions": [PREDICATE]} | wrong
    reply = httpx.post(f"{server.url}/v1/decisions", json=body)
    assert reply.status_code == 400, reply.text
    assert reason in reply.json()["error"]["message"]
