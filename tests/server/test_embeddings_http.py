"""POST /v1/embeddings: the real `openai` client and its default encoding, limits, errors, and long answers."""

import base64
import threading
import time
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from server_process import ServerProcess

TEXTS = ["The module", "A longer text about modules, files and statements", "The módule 漢字"]


def post(server: ServerProcess, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)


def test_the_openai_client(client: openai.OpenAI, server: ServerProcess) -> None:
    """It asks for base64 by default, and decodes it."""
    reply = client.embeddings.create(model="tiny", input=TEXTS, user="someone")
    assert [each.index for each in reply.data] == [0, 1, 2] and reply.model == "tiny"
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 10
    vectors = [each.embedding for each in reply.data]
    assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1, 1, 1], abs=1e-5)
    floats = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    assert [each.embedding for each in floats.data] == vectors, "exactly"
    [encoded, *_] = post(server, input=TEXTS, encoding_format="base64").json()["data"]
    assert np.frombuffer(base64.b64decode(encoded["embedding"]), "<f4").tolist() == vectors[0]
    short = client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=8).data[0].embedding
    assert len(short) == 8 and sum(x * x for x in short) == pytest.approx(1, abs=1e-5)


def test_all_forms_of_input(server: ServerProcess) -> None:
    tokens = [httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    expected = [each["embedding"] for each in post(server, input=TEXTS).json()["data"]]
    assert [each["embedding"] for each in post(server, input=tokens).json()["data"]] == expected
    assert post(server, input=tokens[0]).json()["data"][0]["embedding"] == expected[0]
    assert post(server, input=TEXTS[0]).json()["data"][0]["embedding"] == expected[0]


def test_pooling_and_the_other_options(server: ServerProcess) -> None:
    def one(**options: Any) -> list[float]:
        return post(server, input=TEXTS[1], **options).json()["data"][0]["embedding"]  # type: ignore[no-any-return]

    last, mean, raw = one(), one(pooling="mean"), one(normalize=False)
    assert last == one(pooling="last") and last != mean
    assert raw == one(use_activation=False) and np.linalg.norm(raw) > 2
    assert (np.array(raw) / np.linalg.norm(raw)).tolist() == pytest.approx(last, abs=1e-6)
    assert one(truncate_prompt_tokens=3) != last == one(truncate_prompt_tokens=-1)
    long = post(server, input="word " * 600, truncate_prompt_tokens=-1).json()
    assert long["usage"]["prompt_tokens"] == 511


def test_langchain(server: ServerProcess) -> None:
    from langchain_openai import OpenAIEmbeddings

    # It sends token ids of OpenAI's vocabulary unless told otherwise.
    embedder = OpenAIEmbeddings(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    expected = [each["embedding"] for each in post(server, input=TEXTS).json()["data"]]
    assert embedder.embed_documents(TEXTS) == expected
    assert embedder.embed_query(TEXTS[0]) == expected[0]


@pytest.mark.parametrize(
    "body, status, param",
    [
        ({}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input"),
        ({"input": [[]]}, 400, "input"),
        ({"input": {"text": "a"}}, 400, "input"),
        ({"input": ["a"] * 2049}, 400, "input"),
        ({"input": [512]}, 400, "prompt"),
        ({"input": "word " * 600}, 400, "prompt"),
        ({"input": [[5] * 511] * 2048}, 413, None),
        ({"input": "a", "model": "other"}, 404, "model"),
        ({"input": "a", "dimensions": 97}, 400, "dimensions"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "a", "pooling": "max"}, 400, "pooling"),
        ({"input": "a", "embed_dtype": "float16"}, 400, "embed_dtype"),
        ({"input": "a", "unknown": 1}, 400, "unknown"),
        ({"input": "a", "timeout": -1}, 400, "timeout"),
    ],
)
def test_what_is_refused(server: ServerProcess, body: dict[str, Any], status: int, param: str | None) -> None:
    reply = post(server, **body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert len(error["message"]) < 400


def test_the_tokens_of_a_request_are_limited(server: ServerProcess) -> None:
    reply = post(server, input=["a b c " * 180] * 2000, truncate_prompt_tokens=-1)
    assert reply.status_code == 400 and "tokens together" in reply.json()["error"]["message"]


def test_a_large_request_holds_nobody_up(server: ServerProcess) -> None:
    """While 2,048 inputs are computed and 2,048 x 96 numbers are sent, another client is answered at once."""
    delays: list[float] = []
    done = threading.Event()

    def probe() -> None:
        with httpx.Client() as http:
            while not done.is_set():
                started = time.perf_counter()
                assert http.get(f"{server.url}/health").status_code == 200
                delays.append(time.perf_counter() - started)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        reply = post(server, input=[[i % 500, i // 500] for i in range(2048)])
    finally:
        done.set()
        thread.join()
    assert len(reply.json()["data"]) == 2048
    assert sorted(delays)[int(0.99 * len(delays))] < 0.25
