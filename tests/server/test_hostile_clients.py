"""Requests that schemathesis generates from the server's own OpenAPI document, hostile constraints, and cut streams."""

import contextlib
import itertools
import json
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from server_process import ServerProcess

PROBE = {"prompt": "The module", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
REQUEST_SECONDS = 60.0  # in which every request must be answered, on a busy machine
HEALTH_SECONDS = 2.0  # in which /health must be answered, on a busy machine


@pytest.fixture(scope="module")
def attacked(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    data = tmp_path_factory.mktemp("data")
    flags = ("--data-dir", str(data), "--request-timeout", "5", "--access-log", "none")
    with ServerProcess(tiny_llama, *flags) as server:
        yield server


def probe(server: ServerProcess) -> Any:
    return httpx.post(f"{server.url}/v1/completions", json=PROBE, timeout=60).json()["choices"]


def until_idle(server: ServerProcess) -> None:
    """Wait until no request is live and no page is used."""
    deadline = time.monotonic() + 10
    while True:
        [model] = httpx.get(f"{server.url}/stats").json()["models"]
        engine = model["engine"]
        used = engine["num_pages"] - engine["free_pages"] - engine["cached_pages"]
        if (engine["running"], engine["waiting"], used) == (0, 0, 0):
            return
        assert time.monotonic() < deadline, model
        time.sleep(0.01)


def attack(url: str, count: int) -> Counter[int]:
    """Send at least `count` requests, valid and invalid ones alike, and return how often each status came back."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    statuses = Counter[int]()
    seeds = itertools.count()
    while statuses.total() < count:  # some operations have only one possible request
        for operation, mode in itertools.product(operations, GenerationMode):
            _attack(operation, mode, max(1, count // 100), next(seeds), statuses)
    return statuses


def _attack(operation: Any, mode: GenerationMode, count: int, seed: int, statuses: Counter[int]) -> None:
    documented = {int(status) for status in operation.responses.status_codes if status.isdecimal()}

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        response = case.call(timeout=REQUEST_SECONDS, stream=False)
        statuses[response.status_code] += 1
        allowed = response.status_code < 500 or response.status_code in documented | {504}
        assert allowed, (case.as_curl_command(), response.status_code, response.text)
        case.validate_response(response, checks=[schemathesis.checks.CHECKS.get_one("response_schema_conformance")])

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing can be wrong in a request without a body
        send()


def test_generated_requests(attacked: ServerProcess, many: bool) -> None:
    expected = probe(attacked)
    statuses = attack(attacked.url, 3000 if many else 100)
    assert statuses[200] > 20 and statuses[400] > 20, statuses
    until_idle(attacked)
    assert probe(attacked) == expected


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubling(depth: int) -> Any:
    """A schema that has 2^depth alternatives if its references are expanded."""
    definitions = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{depth}": {"type": "string"}}}


HOSTILE: dict[str, Any] = {
    "nested quantifiers": {"guided_regex": "(a+)+b"},
    "backtracking": {"guided_regex": "(x+x+)+y"},
    "a huge repetition": {"guided_regex": "(a{1000}){1000}"},
    "repetitions of repetitions": {"guided_regex": "((((a{1,50}){1,50}){1,50}){1,50}){1,50}"},
    "any text and a letter": {"guided_regex": ".*a.{300}"},
    "an intersection of lookaheads": {"guided_regex": "(?=.*a)(?=.*b)(?=.*c).*"},
    "a wide alternation": {"guided_regex": "|".join(f"{i}x*{i}" for i in range(5000))},
    "unicode classes": {"guided_regex": r"(\p{L}|\p{N}|\p{S}){1,2000}"},
    "an unclosed group": {"guided_regex": "(" * 5000},
    "left recursion": {"guided_grammar": 'start: start start | "a"'},
    "ambiguity": {"guided_grammar": 'start: x x x x x x\nx: x x | "a" | ""'},
    "a loop of empty rules": {"guided_grammar": "start: x\nx: y\ny: x | "},
    "thousands of rules": {
        "guided_grammar": "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(2000)) + '\nstart: r0\nr2000: "a"'
    },
    "an undefined rule": {"guided_grammar": "start: nothing"},
    "deep nesting": {"guided_json": nested(60)},
    "deeper nesting": {"guided_json": nested(300)},
    "a reference to itself": {"guided_json": {"$ref": "#"}},
    "recursion": {"guided_json": {"type": "array", "items": {"$ref": "#"}, "minItems": 2}},
    "exponential references": {"guided_json": doubling(40)},
    "a long minimum": {"guided_json": {"type": "string", "minLength": 10**9}},
    "many items": {"guided_json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
    "a wide enum": {"guided_json": {"enum": [str(i) * 20 for i in range(4000)]}},
    "many properties": {
        "guided_json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
    },
    "a hostile pattern": {"guided_json": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}},
    "tiny multiples": {"guided_json": {"type": "number", "multipleOf": 1e-300}},
    "wide bounds": {"guided_json": {"type": "integer", "minimum": -(10**300), "maximum": 10**300}},
    "an intersection": {"guided_json": {"allOf": [{"pattern": f"^.*{i}.*$", "type": "string"} for i in range(60)]}},
    "many choices": {"guided_choice": ["a" * i for i in range(1, 4000)]},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_constraints_end_in_time(attacked: ServerProcess, case: str) -> None:
    """The request is answered within its limits, and others meanwhile."""
    body = {"prompt": "x", "max_tokens": 8, **HOSTILE[case]}
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=attacked.url, timeout=REQUEST_SECONDS) as http:
        http.get("/health")
        answer = pool.submit(httpx.post, f"{attacked.url}/v1/completions", json=body, timeout=REQUEST_SECONDS)
        slowest = 0.0
        while not answer.done():
            began = time.perf_counter()
            assert http.get("/health").status_code == 200
            slowest = max(slowest, time.perf_counter() - began)
            time.sleep(0.01)
    reply = answer.result()
    assert reply.status_code in (200, 400, 504), reply.text
    assert slowest < HEALTH_SECONDS


def test_the_server_is_right_after_hostile_constraints(attacked: ServerProcess) -> None:
    until_idle(attacked)
    assert probe(attacked) == probe(attacked)


CHAT: Any = {"messages": [{"role": "user", "content": "Hello"}]}
STREAMS: dict[str, Any] = {
    "/v1/completions": {"prompt": "The module", "max_tokens": 300, "n": 2},
    "/v1/chat/completions": CHAT | {"max_tokens": 300, "logprobs": True},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 300},
    "/v1/messages": CHAT | {"model": "tiny", "max_tokens": 300},
    "/api/generate": {"model": "tiny", "prompt": "Hello", "options": {"num_predict": 300}},
}


@pytest.mark.parametrize("path", STREAMS)
def test_streams_cut_at_any_byte_free_everything(attacked: ServerProcess, path: str, many: bool) -> None:
    body = json.dumps(STREAMS[path] | {"stream": True, "ignore_eos": True}).encode()
    head = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    request = "\r\n".join([*head, "", ""]).encode() + body
    expected = probe(attacked)
    for length in range(0, 1200, 1 if many else 31):
        with socket.create_connection(attacked.address, timeout=10) as connection:
            if length % 2:  # the connection is reset, not closed
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(request)
            received = 0
            while received < length:
                part = connection.recv(length - received)
                assert part, "the stream ended before it was cut"
                received += len(part)
    for length in range(1, len(request), 1 if many else 31):  # the request itself is cut
        with socket.create_connection(attacked.address, timeout=10) as connection:
            connection.sendall(request[:length])
    until_idle(attacked)
    assert probe(attacked) == expected
