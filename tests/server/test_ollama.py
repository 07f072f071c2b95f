"""Ollama's routes as the real `ollama` client sees them."""

from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from octavo.text import Tokenizer
from server_process import ServerProcess

HELLO: Any = [{"role": "user", "content": "Say hello to the modules"}]
OPTIONS: Any = {"temperature": 0, "num_predict": 8, "num_ctx": 512, "ignore_eos": True}


@pytest.fixture(scope="module")
def llama(server: ServerProcess) -> ollama.Client:
    return ollama.Client(host=server.url, timeout=60)


def test_chat_whole_and_streamed(llama: ollama.Client, server: ServerProcess) -> None:
    body = {"messages": HELLO, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    expected = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    text = expected["choices"][0]["message"]["content"]
    whole = llama.chat("tiny:latest", HELLO, options=OPTIONS)
    assert (whole.message.content, whole.done, whole.done_reason) == (text, True, "length")
    assert (whole.prompt_eval_count, whole.eval_count) == (expected["usage"]["prompt_tokens"], 8)
    assert (whole.total_duration or 0) > 0
    parts = list(llama.chat("tiny", HELLO, options=OPTIONS, stream=True))
    assert "".join(part.message.content or "" for part in parts) == text
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]


def test_generate(llama: ollama.Client, server: ServerProcess) -> None:
    assert llama.generate("tiny", HELLO[0]["content"], options=OPTIONS).response == (
        llama.chat("tiny", HELLO, options=OPTIONS).message.content
    )
    body = {"prompt": "The module", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    expected = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    assert llama.generate("tiny", "The module", raw=True, options=OPTIONS).response == expected
    assert llama.generate("tiny").done_reason == "load"


def test_embed(llama: ollama.Client, server: ServerProcess) -> None:
    texts = ["The module", "Another, longer text about modules"]
    expected = httpx.post(f"{server.url}/v1/embeddings", json={"input": texts}, timeout=60).json()
    reply = llama.embed("tiny", texts)
    assert [list(each) for each in reply.embeddings] == [each["embedding"] for each in expected["data"]]
    assert reply.prompt_eval_count == expected["usage"]["prompt_tokens"] and (reply.total_duration or 0) > 0
    assert len(llama.embed("tiny:latest", texts[0], dimensions=8).embeddings[0]) == 8
    assert list(llama.embed("tiny", []).embeddings) == []
    older = llama.embeddings("tiny", texts[0]).embedding
    length = sum(value * value for value in older) ** 0.5
    assert [value / length for value in older] == pytest.approx(expected["data"][0]["embedding"], abs=1e-6)


def test_embed_leaves_out_the_end_of_a_long_input(
    llama: ollama.Client, server: ServerProcess, tiny_llama: Path
) -> None:
    tokens = Tokenizer.load(tiny_llama).encode("one two " * 600)
    assert len(tokens) > 600
    begin = httpx.post(f"{server.url}/v1/embeddings", json={"input": tokens[:511]}, timeout=60).json()
    reply = llama.embed("tiny", "one two " * 600)
    assert reply.prompt_eval_count == 511
    assert list(reply.embeddings[0]) == begin["data"][0]["embedding"]


def test_models(llama: ollama.Client) -> None:
    assert [model.model for model in llama.list().models] == ["tiny"]
    assert [model.context_length for model in llama.ps().models] == [512]
    assert llama.show("tiny:latest").modelinfo["octavo.context_length"] == 512  # type: ignore[index]
    assert llama.show("tiny").capabilities == ["completion", "tools", "embedding"]


@pytest.mark.parametrize(
    "path, change, status",
    [
        ("/api/chat", {"model": "other"}, 404),
        ("/api/chat", {"model": None}, 400),
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": ["AA=="]}]}, 400),
        ("/api/chat", {"messages": [5]}, 400),
        ("/api/chat", {"options": {"temperature": -1}}, 400),
        ("/api/chat", {"options": {"mirostat": 2}}, 400),
        ("/api/generate", {"prompt": "a", "template": "b"}, 400),
        ("/api/embed", {"input": "a", "dimensions": 10_000}, 400),
        ("/api/embed", {"input": "word " * 600, "truncate": False}, 400),
        ("/api/embed", {"input": [1, 2]}, 400),
        ("/api/embed", {"model": "other", "input": "a"}, 404),
        ("/api/pull", {}, 501),
        ("/api/unknown", {}, 404),
    ],
)
def test_errors_have_ollamas_form(server: ServerProcess, path: str, change: dict[str, Any], status: int) -> None:
    reply = httpx.post(f"{server.url}{path}", json={"model": "tiny", "messages": HELLO} | change)
    assert (reply.status_code, list(reply.json())) == (status, ["error"])
    assert isinstance(reply.json()["error"], str)


def test_a_body_without_a_type_is_json_unless_a_browser_sends_it(server: ServerProcess) -> None:
    url, body = f"{server.url}/api/show", b'{"model": "tiny"}'
    assert httpx.post(url, content=body).status_code == 200
    assert httpx.post(url, content=body, headers={"Origin": "https://example.com"}).status_code == 415
    assert httpx.post(url, content=body, headers={"Content-Type": "text/plain"}).status_code == 415
