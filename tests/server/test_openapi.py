"""/openapi.json and /docs: every route is described, and what they say is so."""

import asyncio
import json
import re
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest
from openapi_spec_validator import validate

from octavo import AsyncLLM
from octavo.fleet.fleet import Fleet
from octavo.params import SamplingParams
from octavo.server.app import create_app
from octavo.server.config import ServerConfig
from octavo.server.openapi.document import method_of
from server_process import ServerProcess

KEY = "the-key"
ROW = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
ROW_BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400, "ignore_eos": True}


def without_end(model: Path, folder: Path) -> Path:
    """A copy of a model whose answers do not end before `max_tokens`: it has no end token."""
    shutil.copytree(model, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: settings[key] for key in settings if not key.startswith("eos_")}))
    return folder


@pytest.fixture(scope="module")
def described(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    data = tmp_path_factory.mktemp("data")
    with (
        ServerProcess(without_end(tiny_llama, data / "model"), "--data-dir", str(data), "--admin-key", KEY) as server,
        httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http,
    ):
        yield http


@pytest.fixture(scope="module")
def document(described: httpx.Client) -> dict[str, Any]:
    return described.get("/openapi.json").json()  # type: ignore[no-any-return]


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(path, method, operation) of all operations, those that delete something last."""
    found = [(path, method, each) for path, methods in document["paths"].items() for method, each in methods.items()]
    return sorted(found, key=lambda each: each[1] == "delete")


def check(document: dict[str, Any], content: Any, schema: dict[str, Any]) -> None:
    jsonschema.validate(content, {**schema, "components": document["components"]})


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    validate(document)
    assert document["openapi"].startswith("3.1")


async def every_route(tiny_llama: Path, data: Path) -> list[Any]:
    async with AsyncLLM(str(tiny_llama)) as llm:
        app = create_app(Fleet.of(llm), ServerConfig(data_dir=str(data)))
        return list(app._router.routes)


def test_every_route_is_described(tiny_llama: Path, tmp_path: Path, document: dict[str, Any]) -> None:
    routes = asyncio.run(every_route(tiny_llama, tmp_path))
    paths = {(re.sub(r":path}", "}", route.path), method_of(route).lower()) for route in routes}
    assert paths == {(path, method) for path, method, _ in operations(document)}
    assert len(paths) > 40


def prepared(http: httpx.Client) -> dict[str, str]:
    """Paths of objects -> the id of one that exists."""
    state = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "kv_cache_state": True}).json()
    rows = "\n".join(json.dumps(ROW | {"custom_id": str(i), "body": ROW_BODY}) for i in range(500))
    file = http.post("/v1/files", files={"file": ("rows.jsonl", rows)}, data={"purpose": "batch"}).json()["id"]
    batch = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    endless = {"input": "Hello", "background": True, "stream": False, "max_output_tokens": 400, "ignore_eos": True}
    return {
        "/v1/kv_cache_states/": state["kv_cache_state"]["id"],
        "/v1/files/": file,
        "/v1/batches/": http.post("/v1/batches", json=batch).json()["id"],
        "/v1/responses/": http.post("/v1/responses", json=endless).json()["id"],
        "/v1/models/": "tiny",
        "/page/": "main.js",
    }


def call(http: httpx.Client, ids: dict[str, str], path: str, method: str, operation: dict[str, Any]) -> httpx.Response:
    """The answer to an operation's example."""
    start = path.partition("{")[0]
    url = re.sub(r"{\w+}", lambda _: ids[start], path)
    [(media_type, content)] = operation.get("requestBody", {"content": {"": {}}})["content"].items()
    example = content.get("example")
    if media_type == "multipart/form-data":
        return http.post(url, files={"file": ("rows.jsonl", "{}")}, data={"purpose": example["purpose"]})
    if path == "/v1/batches":
        example = example and example | {"input_file_id": ids["/v1/files/"]}
    if path.endswith(("score", "rerank")):  # the default labels are not single tokens of the tiny model
        example = example | {"labels": ["a", "b"]}
    return http.request(method, url, **({} if example is None else {"json": example}))


def test_every_example_is_answered_as_described(described: httpx.Client, document: dict[str, Any]) -> None:
    ids = prepared(described)
    for path, method, operation in operations(document):
        reply = call(described, ids, path, method, operation)
        [(status, answer)] = [each for each in operation["responses"].items() if each[0] != "default"]
        assert reply.status_code == int(status), (method, path, reply.text)
        content = answer.get("content", {"": {}})
        kind = reply.headers.get("content-type", "").partition(";")[0]
        assert kind in content, (method, path, kind)
        if kind == "application/json":
            check(document, reply.json(), content[kind]["schema"])
        assert "requestBody" not in operation or "example" in json.dumps(operation["requestBody"]), path


def test_streams_are_as_described(described: httpx.Client, document: dict[str, Any]) -> None:
    count = 0
    for path, method, operation in operations(document):
        streams = set(operation["responses"].get("200", {}).get("content", ())) & {
            "text/event-stream",
            "application/x-ndjson",
        }
        if method != "post" or not streams:
            continue
        [kind] = streams
        example = operation["requestBody"]["content"]["application/json"]["example"] | {"stream": True}
        reply = described.post(path, json=example)
        assert reply.headers["content-type"].partition(";")[0] == kind
        lines = reply.text.splitlines()
        schema = operation["responses"]["200"]["content"][kind]["schema"]
        if kind == "text/event-stream":
            schema = schema["properties"]["data"]["contentSchema"]
            lines = [line[6:] for line in lines if line.startswith("data: ") and line != "data: [DONE]"]
        assert len(lines) > 2
        for line in lines:
            check(document, json.loads(line), schema)
        count += 1
    assert count == 6


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/models/none", "/v1/messages", "/api/chat", "/v1/files", "/v1/kv_cache_states/none"]
)
def test_errors_are_as_described(described: httpx.Client, document: dict[str, Any], path: str) -> None:
    of = re.sub(r"models/none", "models/{name}", re.sub(r"states/none", "states/{id}", path))
    method = "get" if "none" in path else "post"
    reply = described.request(method, path, **({} if method == "get" else {"json": {}}))
    assert reply.status_code >= 400
    check(
        document,
        reply.json(),
        document["paths"][of][method]["responses"]["default"]["content"]["application/json"]["schema"],
    )


def test_fields_have_the_descriptions_of_parameters(document: dict[str, Any]) -> None:
    known = {field.name: field.type for field in msgspec.inspect.type_info(SamplingParams).fields}  # type: ignore[attr-defined]
    for body in ("CompletionRequest", "ChatRequest", "ResponsesRequest"):
        field = document["components"]["schemas"][body]["properties"]["temperature"]
        assert field["description"] == known["temperature"].extra_json_schema["description"]  # type: ignore[union-attr]


class Page(HTMLParser):
    """What a page refers to, and the text in its <pre> elements."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors, self.scripts, self.commands = set[str](), set[str](), 0, [""]
        self._pre = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links |= {value for name in ("href", "src") if (value := given.get(name))}
        self.anchors |= {value for value in [given.get("id")] if value}
        self.scripts += tag == "script"
        self._pre = tag == "pre"
        if self._pre:
            self.commands.append("")

    def handle_endtag(self, tag: str) -> None:
        self._pre = False

    def handle_data(self, data: str) -> None:
        if self._pre:
            self.commands[-1] += data


def test_the_page_needs_nothing_from_elsewhere(described: httpx.Client, document: dict[str, Any]) -> None:
    reply = described.get("/docs", headers={"Host": "octavo.localhost:80"})
    page = Page(reply.text)
    assert page.scripts == 0 and "default-src 'none'" in reply.headers["content-security-policy"]
    assert all(link.startswith("#") or link == "openapi.json" for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.anchors
    for path, method, operation in operations(document):
        assert f"{method.upper()} {path}" in reply.text and operation["operationId"] in page.anchors
    assert any("http://octavo.localhost" in command for command in page.commands)


def test_commands_of_the_page_work_in_a_shell(described: httpx.Client) -> None:
    commands = [shlex.split(text) for text in Page(described.get("/docs").text).commands if text.strip()]
    bodies = [(words[1], json.loads(words[words.index("-d") + 1])) for words in commands if "-d" in words]
    url = next(url for url, _ in bodies if url.endswith("/v1/completions"))
    assert described.post(url, json=dict(bodies)[url]).status_code == 200


def test_the_document_comes_without_delaying_others(tiny_llama: Path) -> None:
    """The first request for the document makes it; /health answers meanwhile."""
    with ServerProcess(tiny_llama) as server, httpx.Client(base_url=server.url) as http:
        http.get("/health")
        thread = threading.Thread(target=httpx.get, args=(f"{server.url}/docs",), kwargs={"timeout": 30})
        thread.start()
        slowest = 0.0
        while thread.is_alive():
            began = time.perf_counter()
            http.get("/health")
            slowest = max(slowest, time.perf_counter() - began)
        thread.join()
        assert slowest < 0.5
