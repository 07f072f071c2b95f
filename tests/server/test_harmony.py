"""gpt-oss's format over HTTP: constraints, forced calls and budgets of reasoning, with a random model."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from server_process import ServerProcess
from tiny_models import save_tiny_model, save_tokenizer

MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
TEMPLATE = (
    "{# <|channel|>analysis #}{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SCHEMA: Any = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["x"],
    "additionalProperties": False,
}
HELLO: Any = [{"role": "user", "content": "Say hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("harmony"))
    save_tokenizer(folder, *MARKS)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    with ServerProcess(folder) as server:
        yield server


def choices(server: ServerProcess, **fields: Any) -> list[Any]:
    """The answers of a chat whose reasoning has at most 8 tokens, though a random model may reason again and again."""
    body = {"model": "x", "messages": HELLO, "n": 12, "max_tokens": 300, "temperature": 1, "seed": 1}
    body |= {"model": httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"], "thinking_token_budget": 8}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body | fields, timeout=60)
    assert reply.status_code == 200, reply.text
    found: list[Any] = reply.json()["choices"]
    return found


def test_the_message_on_the_channel_final_follows_a_schema(server: ServerProcess) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "point", "schema": SCHEMA, "strict": True}}
    found = [choice for choice in choices(server, response_format=form) if choice["finish_reason"] == "stop"]
    assert len(found) >= 8
    for choice in found:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert {bool(choice["message"].get("reasoning_content")) for choice in found} == {True, False}


def test_a_forced_call_follows_the_reasoning(server: ServerProcess) -> None:
    tool = {"type": "function", "function": {"name": "put", "parameters": SCHEMA}}
    named = {"type": "function", "function": {"name": "put"}}
    for choice in ("required", named):
        found = choices(server, tools=[tool], tool_choice=choice)
        calls = [each["message"]["tool_calls"][0]["function"] for each in found if each["message"].get("tool_calls")]
        assert len(calls) >= 8
        for call in calls:
            assert call["name"] == "put"
            jsonschema.validate(json.loads(call["arguments"]), SCHEMA)


def test_anthropics_budget_limits_the_reasoning(server: ServerProcess) -> None:
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    body = {"model": model, "messages": HELLO, "max_tokens": 200, "temperature": 1, "output_config": form}

    def thought(thinking: Any) -> int:
        """The characters of all reasoning."""
        characters = 0
        for seed in range(12):
            fields = {"seed": seed, "thinking": thinking}
            reply = httpx.post(f"{server.url}/v1/messages", json=body | fields, timeout=60)
            assert reply.status_code == 200, reply.text
            blocks = reply.json()["content"]
            characters += sum(len(block["thinking"]) for block in blocks if block["type"] == "thinking")
        return characters

    assert 0 < thought({"type": "enabled", "budget_tokens": 3}) < thought({"type": "enabled"}) / 3
