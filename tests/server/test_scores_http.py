"""POST /score and /rerank over HTTP."""

from typing import Any

import httpx
import pytest

from server_process import ServerProcess

QUERY, DOCUMENTS = "What is a module?", ["A module is a file.", "Statements end with a line.", "Nothing."]
LABELS = {"labels": ["a", "b"]}


def post(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores(server: ServerProcess, path: str) -> None:
    reply = post(server, path, model="tiny", text_1=QUERY, text_2=DOCUMENTS, **LABELS).json()
    scores = [each["score"] for each in reply["data"]]
    assert [(each["index"], each["object"]) for each in reply["data"]] == [(i, "score") for i in range(3)]
    assert (reply["object"], reply["model"]) == ("list", "tiny")
    assert all(0 < score < 1 for score in scores)
    assert reply["usage"]["prompt_tokens"] == reply["usage"]["total_tokens"] > 100
    for names in (("queries", "documents"), ("data_1", "data_2")):
        body: Any = {names[0]: [QUERY] * 3, names[1]: [{"text": text} for text in DOCUMENTS]}
        same = post(server, path, **body, **LABELS).json()
        assert [each["score"] for each in same["data"]] == scores
    ids = [httpx.post(f"{server.url}/tokenize", json={"prompt": letter}).json()["tokens"][0] for letter in "ab"]
    same = post(server, path, text_1=QUERY, text_2=DOCUMENTS, label_token_ids=ids).json()
    assert [each["score"] for each in same["data"]] == scores


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_ranks(server: ServerProcess, path: str) -> None:
    scores = post(server, "/score", text_1=QUERY, text_2=DOCUMENTS, **LABELS).json()["data"]
    best = sorted(scores, key=lambda each: -each["score"])
    reply = post(server, path, model="tiny", query=QUERY, documents=DOCUMENTS, **LABELS).json()
    assert [(each["index"], each["relevance_score"]) for each in reply["results"]] == [
        (each["index"], each["score"]) for each in best
    ]
    assert [each["document"]["text"] for each in reply["results"]] == [DOCUMENTS[each["index"]] for each in best]
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    first = post(server, path, query=QUERY, documents=DOCUMENTS, top_n=1, return_documents=False, **LABELS).json()
    assert first["results"] == [{"index": best[0]["index"], "relevance_score": best[0]["score"]}]


@pytest.mark.parametrize(
    "path, body, status",
    [
        ("/score", {"text_1": QUERY}, 400),
        ("/score", {"text_1": QUERY, "documents": DOCUMENTS}, 400),
        ("/score", {"text_1": QUERY, "text_2": DOCUMENTS, "queries": QUERY}, 400),
        ("/score", {"text_1": [QUERY] * 2, "text_2": DOCUMENTS}, 400),
        ("/score", {"text_1": QUERY, "text_2": [5]}, 400),
        ("/score", {"text_1": QUERY, "text_2": "word " * 600}, 400),
        ("/score", {"text_1": QUERY, "text_2": "a", "labels": ["several tokens", "b"]}, 400),
        ("/score", {"text_1": QUERY, "text_2": "a", "label_token_ids": [5, 6]}, 400),
        ("/score", {"text_1": QUERY, "text_2": "a", "template": "{query}"}, 400),
        ("/score", {"text_1": QUERY, "text_2": "a", "use_activation": False}, 400),
        ("/score", {"text_1": QUERY, "text_2": ["a"] * 2049}, 400),
        ("/score", {"text_1": QUERY, "text_2": "a", "model": "other"}, 404),
        ("/rerank", {"query": QUERY, "documents": []}, 400),
        ("/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_n": -1}, 400),
        ("/rerank", {"query": [QUERY], "documents": DOCUMENTS}, 400),
        ("/rerank", {"documents": DOCUMENTS}, 400),
    ],
)
def test_what_is_refused(server: ServerProcess, path: str, body: dict[str, Any], status: int) -> None:
    reply = post(server, path, **LABELS, **body) if "labels" not in body else post(server, path, **body)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]


def test_labels_that_the_vocabulary_does_not_have(server: ServerProcess) -> None:
    """The tiny vocabulary has no single token for "yes"."""
    reply = post(server, "/score", text_1=QUERY, text_2="a")
    assert reply.status_code == 400 and "'yes'" in reply.json()["error"]["message"]
