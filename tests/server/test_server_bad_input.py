"""What a server does with input that is wrong: one line in OpenAI's error schema, and everybody else is served on."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.server.config import ServerConfig
from octavo.server.openai.protocol import ChatRequest, CompletionRequest
from server_process import ServerProcess

MAX_BODY = ServerConfig().max_body_bytes
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error object, which must be one of OpenAI's, and one line."""
    body = reply.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if reply.status_code < 500 else "server_error")
    assert "\n" not in error["message"] and 5 < len(error["message"]) <= 400
    return error


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": "The module", "max_tokens": 2, **fields}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": USER, "max_tokens": 2, **fields}


def message(**fields: Any) -> tuple[str, dict[str, Any]]:
    return chat(messages=[{"role": "user", "content": "Hello", **fields}])


@pytest.mark.parametrize(
    ("request_", "param", "said"),
    [
        (completion(prompt=None), "prompt", "should be a string"),
        (completion(prompt=""), "prompt", "empty"),
        (completion(prompt=[]), "prompt", "empty"),
        (completion(prompt=["a", ""]), "prompt", "empty"),
        (completion(prompt=["a", 1]), "prompt", "list of either"),
        (completion(prompt=[True]), "prompt", "list of either"),
        (completion(prompt=[1.5]), "prompt", "list of either"),
        (completion(prompt=[-1]), "prompt", "token id"),
        (completion(prompt=[512]), "prompt", "token id"),
        (completion(prompt=[10**30]), "prompt", "token id"),
        (completion(prompt={"a": 1}), "prompt", "should be a string"),
        (completion(prompt=["a"] * 1025), "prompt", "more than 1024"),
        (completion(prompt=["a"] * 513, n=2), "prompt", "more than 1024"),
        (completion(max_tokens=-5), "max_tokens", "at least 0"),
        (completion(max_tokens=2**31), "max_tokens", "at most 2,147,483,647"),
        (completion(max_tokens="ten"), "max_tokens", "integer"),
        (completion(max_tokens="10"), "max_tokens", "integer"),
        (completion(max_tokens=1.5), "max_tokens", "integer"),
        (completion(max_tokens=True), "max_tokens", "integer"),
        (completion(max_tokens=10**40), "max_tokens", "at least 0"),
        (completion(min_tokens=3), "min_tokens", "at most max_tokens"),
        (completion(temperature=-0.1), "temperature", "from 0"),
        (completion(temperature=1e30), "temperature", "100"),
        (completion(temperature="hot"), "temperature", "number"),
        (completion(top_p=-0.1), "top_p", "above 0"),
        (completion(top_p=1.1), "top_p", "at most 1"),
        (completion(top_k=-2), "top_k", "or 0 for all"),
        (completion(min_p=2), "min_p", "from 0 to 1"),
        (completion(n=0), "n", "from 1"),
        (completion(n=10**6), "n", "128"),
        (completion(n=3, best_of=2), "best_of", "from n (3)"),
        (completion(seed=2**70), "seed", "64-bit"),
        (completion(stop=""), "stop", "1 to 1,024 characters"),
        (completion(stop=[1]), "stop", "string"),
        (completion(stop=["x"] * 17), "stop", "16"),
        (completion(stop_token_ids=[-1]), "stop_token_ids", "token ids"),
        (completion(stop_token_ids=[512]), "stop_token_ids", "vocabulary"),
        (completion(presence_penalty=3), "presence_penalty", "from -2 to 2"),
        (completion(frequency_penalty=-3), "frequency_penalty", "from -2 to 2"),
        (completion(repetition_penalty=0), "repetition_penalty", "above 0"),
        (completion(logit_bias={"x": 1}), "logit_bias", "token ids"),
        (completion(logit_bias={"-1": 1}), "logit_bias", "token ids"),
        (completion(logit_bias={"9" * 5000: 1}), "logit_bias", "token ids"),
        (completion(logit_bias={"1": 101}), "logit_bias", "-100 to 100"),
        (completion(logit_bias={"512": 1}), "logit_bias", "vocabulary"),
        (completion(logit_bias=[1]), "logit_bias", "object"),
        (completion(logprobs=21), "logprobs", "20"),
        (completion(logprobs=True), "logprobs", "integer"),
        (completion(prompt_logprobs=21), "prompt_logprobs", "20"),
        (completion(max_tokens=0, kv_cache_state=True), "kv_cache_state", "max_tokens"),
        (completion(suffix="end"), "suffix", "tokens to fill in the middle"),
        (completion(stream="yes"), "stream", "boolean"),
        (completion(stream_options={"include_usage": True}), None, "stream to be true"),
        (completion(stream=True, stream_options={"usage": True}), "stream_options.usage", "unknown field"),
        (completion(temprature=1), "temprature", "did you mean temperature?"),
        (completion(messages=USER), "messages", "unknown field"),
        (completion(priority=1001), "priority", "from -1000 to 1000"),
        (completion(priority=10**30), "priority", "1000"),
        (completion(priority=1.5), "priority", "integer"),
        (completion(priority="high"), "priority", "integer"),
        (completion(priority=[1]), "priority", "integer"),
        (completion(tenant=5), "tenant", "string"),
        (completion(tenant="a" * 257), "tenant", "at most 256"),
        (completion(tenant="a\nb"), "tenant", "printable"),
        (completion(ttft_target=0), "ttft_target", "seconds"),
        (completion(timeout=-1), "timeout", "seconds"),
        (completion(timeout=1e9), "timeout", "at most a day"),
        (completion(timeout="1"), "timeout", "number"),
        (completion(cache_salt=""), "cache_salt", "1 to 256"),
        (completion(cache_salt="a" * 257), "cache_salt", "1 to 256"),
        (completion(cache_salt="a" * 10**6), "cache_salt", "1 to 256"),
        (completion(prority=1), "prority", "did you mean priority?"),
        (completion(salt="x"), "salt", "unknown field"),
        (completion(**{"x" * 10**6: 1}), "x" * 100, "unknown field"),
        (completion(**{f"x{i}": 1 for i in range(2000)}), None, " fields"),
        (chat(messages=[]), "messages", "should not be empty"),
        (chat(messages="Hello"), "messages", "array"),
        (chat(messages=None), "messages", "array"),
        (chat(messages=["Hello"]), "messages[0]", "object"),
        (chat(messages=[*USER, {"role": "robot", "content": "x"}]), "messages[1].role", "'user'"),
        (chat(messages=[{"content": "x"}]), "messages[0].role", "missing"),
        (chat(messages=[{"role": "user"}]), "messages[0]", "no content"),
        (message(content=5), "messages[0].content", "string"),
        (message(content=[5]), "messages[0].content", "part 0"),
        (message(content=[{"type": "text"}]), "messages[0].content", "part 0"),
        (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content", "image_url"),
        (message(content=[{"type": "input_audio"}]), "messages[0].content", "input_audio"),
        (message(tool_calls="x"), "messages[0].tool_calls", "array"),
        (message(color="red"), "messages[0].color", "unknown field"),
        (chat(tools=[{"type": "function"}]), "tools", "must have a name"),
        (chat(tool_choice="required"), "tool_choice", "needs tools"),
        (chat(chat_template="{{ messages }}"), "chat_template", "trust_request_chat_template"),
        (chat(truncate_prompt_tokens=-2), "truncate_prompt_tokens", "or -1"),
        (chat(response_format={"type": "xml"}), "response_format", "must have a type"),
        (chat(modalities=["audio"]), "modalities[0]", "'text'"),
        (chat(audio={"voice": "x"}), "audio", "not supported"),
        (chat(logprobs=5), "logprobs", "boolean"),
        (chat(top_logprobs=3), "top_logprobs", "needs logprobs"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs", "20"),
        (chat(max_completion_tokens=0), "max_completion_tokens", "greater than or equal to 1"),
        (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs", "messages"),
        (chat(chat_template_kwargs=[]), "chat_template_kwargs", "object"),
        (chat(prompt="x"), "prompt", "unknown field"),
        (chat(priority=-1001), "priority", "from -1000"),
        (chat(cache_salt=7), "cache_salt", "string"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, str | None) else value[0].rpartition("/")[2],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_fields(
    http: httpx.Client, request_: tuple[str, dict[str, Any]], param: str | None, said: str, stream: bool
) -> None:
    path, body = request_
    if stream and not {"stream", "stream_options"} & body.keys():
        body = {"stream": True, **body}
    reply = http.post(path, json=body)
    error = error_of(reply)
    assert reply.status_code == 400
    assert (error["param"], said in error["message"]) == (param, True), error


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "EOF"),
        (b"{", "EOF"),
        (b"null", "object"),
        (b"[]", "object"),
        (b'{"prompt": "x",}', "trailing comma"),
        (b'{"prompt": "x"} x', "trailing characters"),
        (b'{"prompt": "\xff"}', "unicode"),
        (b'{"prompt": "\\ud800"}', "escape"),
        (b'{"prompt": "x", "temperature": NaN}', "finite"),
        (b'{"prompt": "x", "temperature": Infinity}', "finite"),
        (b'{"prompt": "x", "temperature": 1e999}', "finite"),
        (b'{"prompt": "x", "logit_bias": {"1": NaN}}', "finite"),
        (b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}", "out of range"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
        (b'{"prompt": "x", "user": ' + b'{"a":' * 30_000 + b"1" + b"}" * 30_001, "recursion"),
        ('{"prompt": "x"}'.encode("utf-16"), "JSON"),
    ],
    ids=lambda value: str(value[:24]),
)
def test_bodies_that_are_no_json(http: httpx.Client, body: bytes, said: str) -> None:
    reply = http.post(COMPLETIONS, content=body, headers=JSON)
    assert reply.status_code == 400
    assert said in error_of(reply)["message"]


def test_prompt_longer_than_the_context(http: httpx.Client) -> None:
    for path, body in (
        completion(prompt="word " * 1000),
        completion(prompt=[5] * 512),
        message(content="word " * 9000),
    ):
        for stream in (False, True):
            reply = http.post(path, json=body | {"stream": stream})
            assert reply.status_code == 400
            assert error_of(reply)["code"] == "context_length_exceeded"
    assert http.post(COMPLETIONS, json={"prompt": [5] * 511, "max_tokens": 9}).json()["usage"]["total_tokens"] == 512


def test_unknown_model(http: httpx.Client) -> None:
    for path, body in (completion(model="gpt-9"), chat(model="gpt-9")):
        reply = http.post(path, json=body)
        error = error_of(reply)
        assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "gpt-9" in error["message"] and "tiny" in error["message"]


def test_routes_and_methods(http: httpx.Client) -> None:
    reply = http.post("/v1/nonsense", json={})
    assert reply.status_code == 404 and "/v1/nonsense" in error_of(reply)["message"]
    reply = http.get(CHAT)
    assert reply.status_code == 405 and reply.headers["allow"] == "POST" and error_of(reply)


def test_content_type(http: httpx.Client) -> None:
    """A web page cannot make a browser post JSON here without being asked first."""
    reply = http.post(COMPLETIONS, content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert reply.status_code == 415 and "application/json" in error_of(reply)["message"]


def test_declared_body_too_large(server: ServerProcess) -> None:
    """Refused by its header, before it is sent."""
    with socket.create_connection(server.address, timeout=30) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {MAX_BODY + 1}\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_chunked_body_too_large(http: httpx.Client) -> None:
    """Its size is known only as it arrives. One that is just within the limit is read, and found wrong."""
    piece = b" " * 2**20
    for pieces, status in ((MAX_BODY // len(piece), 400), (MAX_BODY // len(piece) + 1, 413)):
        reply = http.post(COMPLETIONS, content=(piece for _ in range(pieces)), headers=JSON)
        assert reply.status_code == status
        assert error_of(reply)["code"] == ("body_too_large" if status == 413 else "invalid_json")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # https to an http port
        b"GARBAGE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\n{",  # and no more
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET //[%ff%00%0a HTTP/1.1\r\nHost: [\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ],
)
def test_broken_http_harms_nobody(server: ServerProcess, http: httpx.Client, sent: bytes) -> None:
    with socket.create_connection(server.address, timeout=30) as connection:
        connection.sendall(sent)
        assert http.get("/health").status_code == 200  # by now it has been read
    assert http.get("/health").status_code == 200
    assert server.stderr() == ""


def test_running_requests_are_unharmed(http: httpx.Client) -> None:
    """A stream is the same with a storm of bad requests beside it."""
    body = {"prompt": "The module", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    expected = http.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
    text = ""
    with http.stream("POST", COMPLETIONS, json=body | {"stream": True}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if len(text) % 4 == 0:
                    assert httpx.post(f"{http.base_url}{COMPLETIONS}", content=b"{", headers=JSON).status_code == 400
                    path, bad = completion(prompt=[9999])
                    assert httpx.post(f"{http.base_url}{path}", json=bad).status_code == 400
    assert text == expected


# Any JSON at all

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def bodies(model: type[CompletionRequest | ChatRequest], sound: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A sound body with some of its fields, or of the fields it could have, replaced by anything."""
    wild = st.dictionaries(st.sampled_from(sorted(model.model_fields)) | st.text(max_size=8), VALUES, max_size=3)
    return wild.map(lambda fields: sound | {"max_tokens": 2} | fields)


REQUESTS = st.one_of(
    st.tuples(st.just(COMPLETIONS), bodies(CompletionRequest, {"prompt": "x"}) | VALUES),
    st.tuples(st.just(CHAT), bodies(ChatRequest, {"messages": USER}) | VALUES),
    st.tuples(st.just(CHAT), VALUES.map(lambda content: {"messages": [{"role": "user", "content": content}]})),
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(request_=REQUESTS)
def test_any_json_is_served_or_refused(http: httpx.Client, request_: tuple[str, Any]) -> None:
    path, body = request_
    # json.dumps writes NaN, Infinity and lone surrogates as they are: invalid JSON is among what is sent.
    reply = http.post(path, content=json.dumps(body).encode(), headers=JSON)
    if reply.status_code == 200:
        assert b'"error"' not in reply.content.partition(b"\n")[0]
    elif reply.status_code == 504:
        assert 0 < body["timeout"] < 60
    else:
        assert reply.status_code in (400, 404), reply.text
        error_of(reply)
    assert http.get("/health").status_code == 200
