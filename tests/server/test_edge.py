"""What the server does at the edge: HTTP as clients in the field speak it, timeouts, limits, ids, logs, CORS."""

import asyncio
import gzip
import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.fleet.fleet import Fleet
from octavo.server.app import create_app
from octavo.server.config import ServerConfig
from octavo.server.edge.access_log import AccessLog, RequestRecord
from octavo.server.listeners import listen
from server_process import COMPLETIONS, ServerProcess, serving

BODY = {"prompt": "The module", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
JSON = {"content-type": "application/json"}
QUICK = ServerConfig(
    first_byte_timeout=0.1, header_timeout=0.2, body_timeout=0.2, idle_timeout=0.3, send_timeout=0.3,
    max_pending_body_bytes=100_000, cors_origins="https://a.example",
)  # fmt: skip


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def request(body: Any = BODY, *headers: str, version: str = "1.1", close: bool = True) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {COMPLETIONS} HTTP/{version}", "Host: localhost", "Content-Type: application/json"]
    lines += ["Connection: close"] * close
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", *headers]).encode() + b"\r\n\r\n" + content


def exchange(server: ServerProcess, sent: bytes, half_close: bool = False) -> bytes:
    """All that comes back until the server closes the connection."""
    received = b""
    with socket.create_connection(server.address, timeout=30) as connection:
        connection.sendall(sent)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            received += part
    return received


def error_code(reply: bytes) -> str:
    error: dict[str, str] = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error["code"]


# C1: timeouts and limits on connections and bodies


def until_closed(config: ServerConfig, model: Path, sent: bytes, count: int = 1) -> list[bytes]:
    """What each of `count` connections gets that sends this and then nothing."""

    async def one(address: Any) -> bytes:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(sent)
        received = await reader.read()
        writer.close()
        return received

    async def main() -> list[bytes]:
        async with serving(model, config) as (_, _, address):
            return await asyncio.gather(*(one(address) for _ in range(count)))

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"", None, None),
        (b"\r\n\r\n", None, None),
        (b"GET /health HTTP/1.1\r\nHos", 408, "header_timeout"),
        (request() + b"POST ", 200, None),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
         408, "body_timeout"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 200, None),
    ],
    ids=["silent", "blank lines", "half a header", "half a second request", "half a body", "idle"],
)  # fmt: skip
def test_connections_that_make_no_progress_are_closed(
    tiny_llama: Path, sent: bytes, status: int | None, code: str | None
) -> None:
    for reply in until_closed(QUICK, tiny_llama, sent, count=3):
        if status is None:
            assert reply == b""
        else:
            assert reply.startswith(f"HTTP/1.1 {status} ".encode())
            assert code is None or error_code(reply) == code


def test_a_body_that_trickles_ends_by_its_timeout(tiny_llama: Path) -> None:
    async def main() -> bytes:
        async with serving(tiny_llama, QUICK) as (_, _, address):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(request(BODY | {"user": "x" * 1000})[:-500])
            received = asyncio.ensure_future(reader.read())
            while not received.done():
                writer.write(b"x")
                await asyncio.wait((received,), timeout=0.02)
            return received.result()

    assert error_code(asyncio.run(main())) == "body_timeout"


def test_unfinished_bodies_are_limited_together(tiny_llama: Path) -> None:
    config = ServerConfig(max_pending_body_bytes=100_000, body_timeout=5)
    body = json.dumps(BODY | {"metadata": "x" * 60_000}).encode()
    lines = [f"POST {COMPLETIONS} HTTP/1.1", "Content-Type: application/json", f"Content-Length: {len(body)}", "", ""]
    head = "\r\n".join(lines).encode()

    async def main() -> None:
        async with serving(tiny_llama, config) as (_, _, address):
            first, second = [await asyncio.open_connection(*address) for _ in range(2)]
            for _, writer in (first, second):
                writer.write(head + body[:-1])
            refused, waiting = await asyncio.wait(
                [asyncio.ensure_future(reader.readuntil(b"\r\n\r\n")) for reader, _ in (first, second)],
                return_when=asyncio.FIRST_COMPLETED,
            )
            assert refused.pop().result().startswith(b"HTTP/1.1 503 ")
            for _, writer in (first, second):
                writer.write(body[-1:])
            assert (await waiting.pop()).startswith(b"HTTP/1.1 200 ")
            for _, writer in (first, second):
                writer.close()

    asyncio.run(main())


def test_idle_connections_make_place_for_new_ones(tiny_llama: Path) -> None:
    async def main() -> None:
        async with serving(tiny_llama, ServerConfig(max_connections=3)) as (_, _, address):
            idle = [await asyncio.open_connection(*address) for _ in range(6)]
            assert [await reader.read() for reader, _ in idle[:3]] == [b""] * 3
            reader, writer = idle[5]
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            for _, each in idle:
                each.close()

    asyncio.run(main())


def test_connections_beyond_the_limit_are_refused_while_all_are_busy(tiny_llama: Path) -> None:
    async def main() -> bytes:
        async with serving(tiny_llama, ServerConfig(max_connections=1)) as (_, _, address):
            busy_reader, busy = await asyncio.open_connection(*address)
            busy.write(request(BODY | {"stream": True, "max_tokens": 400}))
            await busy_reader.readuntil(b"data: ")
            reader, writer = await asyncio.open_connection(*address)
            reply = await reader.read()
            busy.close()
            writer.close()
            return reply

    reply = asyncio.run(main())
    assert reply.startswith(b"HTTP/1.1 503 ") and error_code(reply) == "too_many_connections"


def test_a_client_that_does_not_read_is_cut_off(tiny_llama: Path) -> None:
    async def main() -> None:
        async with serving(tiny_llama, QUICK) as (llm, server, address):
            with socket.socket() as deaf:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                deaf.connect(address)
                body = {"prompt": "x", "max_tokens": 300, "n": 100, "stream": True, "ignore_eos": True, "logprobs": 20}
                deaf.sendall(request(body))
                while not server.server_state.connections:
                    await asyncio.sleep(0)
                while server.server_state.connections:
                    await asyncio.sleep(0.01)
            while (await llm.stats()).running:
                pass

    asyncio.run(main())


# C2 to C5: headers, upgrades, HTTP/1.0, half-close


@pytest.mark.parametrize(
    "header",
    [b"X-Long: " + b"a" * 70_000, b"X-Long: " + b"a" * 3_000_000, b"\r\n".join(b"X-%d: 1" % i for i in range(200))],
    ids=["long", "longer than a read", "many"],
)
def test_a_long_header_is_431(server: ServerProcess, header: bytes) -> None:
    reply = exchange(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + header + b"\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 431 ") and error_code(reply) == "header_too_long"


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "TLS/1.2"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_an_upgrade_is_ignored_and_its_body_read(server: ServerProcess, protocol: str, pieces: int) -> None:
    headers = ("Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}", "HTTP2-Settings: AAMAAABkAAQAAP__")
    sent = request(BODY, *headers, close=False) + request()
    with socket.create_connection(server.address, timeout=30) as connection:
        step = -(-len(sent) // pieces)
        for start in range(0, len(sent), step):
            connection.sendall(sent[start : start + step])
        received = b""
        while part := connection.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 200 ") == 2 and received.count(b'"text_completion"') == 2


def test_http_1_0_gets_a_stream_without_chunks(server: ServerProcess) -> None:
    sent = request(BODY | {"stream": True}, version="1.0", close=False)
    head, _, body = exchange(server, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and b"chunked" not in head.lower()
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"max_tokens": 400}])
def test_a_half_closed_connection_gets_its_answer(server: ServerProcess, options: dict[str, Any]) -> None:
    reply = exchange(server, request(BODY | options, close=False), half_close=True)
    assert reply.startswith(b"HTTP/1.1 200 ") and reply.count(b"HTTP/1.1") == 1
    assert b'"finish_reason":"length"' in reply


# C6: methods, CORS, compressed bodies, malformed HTTP


def test_head_and_options(http: httpx.Client) -> None:
    for path in ("/health", "/v1/models"):
        got, head = http.get(path), http.head(path)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == got.headers["content-length"]
    reply = http.options("/v1/completions", headers={"origin": "https://a.example"})
    assert reply.status_code == 204 and "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("origins", ["https://a.example", "*", "https://b.example, https://a.example/"])
def test_cors_is_a_setting(tiny_llama: Path, origins: str) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}

    async def main() -> None:
        async with (
            serving(tiny_llama, ServerConfig(cors_origins=origins)) as (_, _, (host, port)),
            httpx.AsyncClient(base_url=f"http://{host}:{port}") as client,
        ):
            origin = {"origin": "https://a.example"}
            allowed = "*" if origins == "*" else "https://a.example"
            preflight = await client.options(COMPLETIONS, headers=origin | asked)
            assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
            assert "POST" in preflight.headers["access-control-allow-methods"]
            ok = await client.post(COMPLETIONS, json=BODY, headers=origin)
            wrong = await client.post(COMPLETIONS, json={}, headers=origin)
            stream = await client.post(COMPLETIONS, json=BODY | {"stream": True}, headers=origin)
            assert [r.status_code for r in (preflight, ok, wrong, stream)] == [204, 200, 400, 200]
            for reply in (preflight, ok, wrong, stream):
                assert reply.headers["access-control-allow-origin"] == allowed
            other = await client.post(COMPLETIONS, json=BODY, headers={"origin": "https://evil.example"})
            assert other.headers.get("access-control-allow-origin") == ("*" if origins == "*" else None)

    asyncio.run(main())


def test_gzip_bodies_are_read_within_the_limits(http: httpx.Client) -> None:
    def post(body: bytes, encoding: str = "gzip") -> httpx.Response:
        return http.post(COMPLETIONS, content=body, headers=JSON | {"content-encoding": encoding})

    packed = gzip.compress(json.dumps(BODY).encode())
    assert post(packed).json()["choices"][0]["text"] == http.post(COMPLETIONS, json=BODY).json()["choices"][0]["text"]
    assert post(gzip.compress(b" " * 17 * 2**20)).status_code == 413
    for broken in (packed[:-4], b"no gzip", packed + b"x"):
        assert post(broken).json()["error"]["code"] == "invalid_encoding"
    assert post(packed, "br").status_code == 415


@pytest.mark.parametrize(
    "sent",
    [b"GARBAGE\r\n\r\n",
     b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET /\xff HTTP/1.1\r\n\r\n",
     b"CONNECT x:443 HTTP/1.1\r\nHost: localhost:443\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"],
)  # fmt: skip
def test_malformed_http_is_answered_in_openais_schema(server: ServerProcess, sent: bytes) -> None:
    reply = exchange(server, sent)
    assert reply[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 405 ")
    assert b"x-request-id: req-" in reply
    error_code(reply)


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"gzip", b"identity, chunked", b"x"])
def test_an_unknown_transfer_coding_is_501(server: ServerProcess, coding: bytes) -> None:
    """Its chunks would else be taken for the body itself."""
    reply = exchange(
        server,
        b"POST "
        + COMPLETIONS.encode()
        + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: "
        + coding
        + b"\r\n\r\n0\r\n\r\n",
    )
    assert reply.startswith(b"HTTP/1.1 501 ")


def test_what_is_malformed_after_a_sound_request_leaves_that_alone(server: ServerProcess) -> None:
    reply = exchange(server, request(BODY | {"max_tokens": 300, "stream": True}, close=False) + b"GARBAGE\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 200 ") and b"data: [DONE]" in reply and reply.count(b"HTTP/1.1") == 1


# C7: request ids and the access log


def test_request_ids_and_processing_time(http: httpx.Client) -> None:
    for path, body in (("/health", None), (COMPLETIONS, BODY), (COMPLETIONS, BODY | {"stream": True}), ("/none", {})):
        method = "GET" if body is None else "POST"
        reply = http.request(method, path, json=body, headers={"x-request-id": "my-id.1"})
        assert reply.headers["x-request-id"] == "my-id.1"
        assert 0 <= int(reply.headers["openai-processing-ms"]) < 60_000
    unusable = [{"x-request-id": id} for id in ("a b", "x" * 129, "\x80".encode())]
    ids = {http.get("/health", headers=headers).headers["x-request-id"] for headers in unusable}
    assert len(ids) == 3 and all(id.startswith("req-") for id in ids)


def log_lines(style: str, model: Path, prompts: bool = False) -> list[str]:
    """The access log of five requests: two answered, one streamed, one refused, one left by its client."""
    out = io.StringIO()

    async def main() -> None:
        config = ServerConfig(access_log=style, access_log_prompts=prompts)
        log = AccessLog(style, out, prompts)
        async with (
            serving(model, config, access_log=log) as (_, server, (host, port)),
            httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=30) as client,
        ):
            await client.get("/health")
            await client.get("/version")
            headers = {"x-request-id": "id-1", "x-octavo-tenant": "ann"}
            await client.post(COMPLETIONS, json=BODY, headers=headers)
            await client.post(COMPLETIONS, json=BODY | {"stream": True}, headers={"x-request-id": "id-2"})
            await client.post(COMPLETIONS, json=BODY | {"temperature": 200}, headers={"x-request-id": "id-3"})
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(request(BODY | {"max_tokens": 400, "stream": True}, "X-Request-Id: id-4"))
            await reader.readuntil(b"data: ")
            writer.close()
            while len(server.server_state.connections) > 1:
                await asyncio.sleep(0.01)
        log.close()

    asyncio.run(main())
    return out.getvalue().splitlines()


def test_the_access_log_in_json(tiny_llama: Path) -> None:
    version, answered, streamed, refused, left = map(json.loads, log_lines("json", tiny_llama))
    assert (version["path"], version["status"]) == ("/version", 200)
    assert answered.items() >= {
        "request_id": "id-1", "method": "POST", "path": COMPLETIONS, "status": 200, "tenant": "ann",
        "completion_tokens": 3, "client": "127.0.0.1",
    }.items()  # fmt: skip
    assert answered["prompt_tokens"] > 0 and answered["model"]
    assert 0 < answered["first_token_ms"] <= answered["duration_ms"]
    assert streamed["stream"] is True and streamed["completion_tokens"] == 3
    assert (refused["status"], refused["error"]) == (400, "invalid_request_error")
    assert left["status"] == 499 and left["completion_tokens"] < 400 and "error" not in left
    assert not any("prompt" in line for line in (version, answered, streamed, refused, left))


def test_the_access_log_in_text(tiny_llama: Path) -> None:
    lines = log_lines("text", tiny_llama, prompts=True)
    assert len(lines) == 5
    assert f"127.0.0.1 POST {COMPLETIONS} 200 request_id=id-1 duration_ms=" in lines[1]
    assert "The module" in lines[1]
    record = RequestRecord("i\x1b[2J", "GET", "/a b\n\x1b[31m", "1.2.3.4", status=404, complete=True)
    out = io.StringIO()
    log = AccessLog("text", out)
    log.write(record)
    log.close()
    assert out.getvalue().count("\n") == 1 and "\x1b" not in out.getvalue()


def test_a_log_that_nobody_reads_stalls_nobody() -> None:
    class Stalled(io.StringIO):
        def write(self, _: str) -> int:
            time.sleep(60)
            return 0

    log = AccessLog("json", Stalled())
    for _ in range(10_002):
        log.write(RequestRecord("i", "GET", "/", "-"))
    assert log._dropped > 0


# C8 to C12: bodies


def test_a_seed_survives_a_javascript_client(http: httpx.Client) -> None:
    for _ in range(8):
        assert http.post(COMPLETIONS, json=BODY).json()["seed"] < 2**53


def test_a_repetition_penalty_too_small_is_400(http: httpx.Client) -> None:
    for value in (1e-320, 1e-46):
        reply = http.post(COMPLETIONS, json=BODY | {"repetition_penalty": value})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "repetition_penalty")


def test_numbers_as_json_has_them(http: httpx.Client) -> None:
    expected = http.post(COMPLETIONS, json=BODY | {"prompt": [5, 6]}).json()["choices"]
    floats = {"prompt": [5.0, 6.0], "max_tokens": 3.0, "n": 1.0, "seed": 7.0}
    for fields in (floats, {"prompt": [[5, 6.0]]}):
        assert http.post(COMPLETIONS, json=BODY | fields).json()["choices"] == expected
    assert http.post(COMPLETIONS, json=BODY | {"max_tokens": 1e300}).status_code == 400
    marked = b"\xef\xbb\xbf" + json.dumps(BODY).encode()
    assert http.post(COMPLETIONS, content=marked, headers=JSON).status_code == 200


def test_top_p_0_is_greedy(http: httpx.Client) -> None:
    greedy = http.post(COMPLETIONS, json=BODY | {"max_tokens": 20}).json()["choices"]
    for seed in (1, 2):
        body = BODY | {"temperature": 1, "top_p": 0, "seed": seed, "max_tokens": 20}
        assert http.post(COMPLETIONS, json=body).json()["choices"] == greedy


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone(http: httpx.Client, stream: bool) -> None:
    body = BODY | {"max_tokens": 0, "echo": True, "prompt": ["One", "Two"], "n": 1}
    if not stream:
        reply = http.post(COMPLETIONS, json=body).json()
        assert [(c["text"], c["finish_reason"]) for c in reply["choices"]] == [("One", "length"), ("Two", "length")]
        assert reply["usage"]["completion_tokens"] == 0 < reply["usage"]["prompt_tokens"]
    else:
        events = http.post(COMPLETIONS, json=body | {"stream": True}).text.split("\n\n")
        choices = [c for e in events if e.startswith("data: {") for c in json.loads(e[6:])["choices"]]
        texts = ["".join(c["text"] for c in choices if c["index"] == i) for i in (0, 1)]
        assert texts == ["One", "Two"]


NEUTRAL_BODIES = {
    "guidellm": {
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "stop": None,
    },
    "sglang-router": {
        "no_stop_trim": False, "ignore_eos": True, "continue_final_message": False, "skip_special_tokens": True,
        "separate_reasoning": True, "stream_reasoning": True, "return_hidden_states": False, "lora_path": None,
        "regex": None, "session_params": None,
    },
    "vllm-router": {
        "include_reasoning": True, "use_beam_search": False, "length_penalty": 1.0, "prompt_logprobs": None,
    },
    "SillyTavern": {
        "max_new_tokens": 3, "top_a": 0, "tfs": 1, "typical_p": 1, "mirostat_mode": 0, "mirostat_tau": 5,
        "min_length": 0, "do_sample": True, "num_beams": 1, "early_stopping": False, "ban_eos_token": False,
        "skip_special_tokens": True, "add_bos_token": True, "guidance_scale": 1, "negative_prompt": "", "rep_pen": 1,
        "dynatemp_low": 0.5, "smoothing_factor": 0, "xtc_probability": 0, "dry_multiplier": 0, "stopping_strings": [],
        "truncation_length": 4096, "sampler_priority": ["top_k"], "logit_bias": {}, "epsilon_cutoff": 0,
    },
    "OpenAI": {"reasoning_effort": "none", "verbosity": "medium", "suffix": "", "user": "me", "metadata": {"a": "b"}},
    "llama.cpp's own page": {
        "reasoning_format": "auto", "timings_per_token": True, "typ_p": 1.0, "n_keep": -1, "backend_sampling": False,
    },
    "options that are off": {"stream_options": {"include_usage": False}, "best_of": 1, "detokenize": True},
    "unheard of": {"frobnicate": None, "knob": False, "dial": 0, "words": [], "name": "", "map": {}},
}  # fmt: skip


@pytest.mark.parametrize("client", NEUTRAL_BODIES)
@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions"])
def test_neutral_fields_change_nothing(http: httpx.Client, client: str, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **BODY} if "chat" in path else dict(BODY)
    if "chat" in path:
        del body["prompt"]
    reply = http.post(path, json=body | NEUTRAL_BODIES[client])
    assert reply.status_code == 200, reply.text
    if "stream" not in NEUTRAL_BODIES[client]:
        assert reply.json()["choices"] == http.post(path, json=body).json()["choices"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("length_penalty", 2.0), ("logits_processors", ["a"]), ("no_stop_trim", True),
        ("top_a", 0.5), ("mirostat_mode", 2), ("reasoning_effort", "high"),
        ("min_length", 5), ("typical_p", 0.9), ("continue_final_message", True),
    ],
)  # fmt: skip
def test_a_field_that_would_change_the_answer_is_refused_by_name(http: httpx.Client, field: str, value: Any) -> None:
    error = http.post(COMPLETIONS, json=BODY | {field: value}).json()["error"]
    assert error["param"] == field and field in error["message"] and "did you mean" not in error["message"]


def test_no_top_logprobs_need_no_logprobs(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "top_logprobs": 0}  # vLLM's default
    assert http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("presense_penalty", "presence_penalty"),
     ("mix_tokens", None), ("top_z", None), ("length", None), ("prompts_logprobs", "prompt_logprobs"),
     ("penalty", None)],
)  # fmt: skip
def test_hints_are_for_slips_alone(http: httpx.Client, wrong: str, hint: str | None) -> None:
    message = http.post(COMPLETIONS, json=BODY | {wrong: 1}).json()["error"]["message"]
    assert message == f"unknown field {wrong}" + (f"; did you mean {hint}?" if hint else "")


def test_two_names_of_one_field_must_agree(http: httpx.Client) -> None:
    error = http.post(COMPLETIONS, json=BODY | {"max_new_tokens": 7}).json()["error"]
    assert error["param"] == "max_new_tokens" and "max_tokens" in error["message"]
    reply = http.post(COMPLETIONS, json={"prompt": "x", "max_new_tokens": 2, "ignore_eos": True}).json()
    assert reply["usage"]["completion_tokens"] == 2


def test_usage_in_every_chunk(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    text = http.post(COMPLETIONS, json=BODY | {"stream": True, "stream_options": options}).text
    usages = [json.loads(event[6:])["usage"] for event in text.split("\n\n") if event.startswith("data: {")]
    assert all(usage["prompt_tokens"] == usages[-1]["prompt_tokens"] > 0 for usage in usages)
    assert [usage["completion_tokens"] for usage in usages] == sorted(usage["completion_tokens"] for usage in usages)
    assert usages[-1]["completion_tokens"] == 3


def test_models_are_described_as_by_vllm(http: httpx.Client, tiny_llama: Path) -> None:
    [card] = http.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and card["root"] == str(tiny_llama) and card["parent"] is None
    assert card["permission"][0]["object"] == "model_permission" and card["permission"][0]["allow_sampling"] is True


@pytest.mark.parametrize(
    ("path", "body", "param", "status"),
    [
        (COMPLETIONS, b'{"prompt": "x", "user": [' + b"0," * 200_000 + b"0]}", None, 413),
        (COMPLETIONS, b'{"prompt": [' + b'"a",' * 1024 + b'"a"]}', "prompt", 400),
        (COMPLETIONS, json.dumps({"prompt": "x", "stop": "a" * 1025}).encode(), "stop", 400),
        (COMPLETIONS, json.dumps({"prompt": "x", "stop_token_ids": [1] * 4097}).encode(), "stop_token_ids", 400),
        ("/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": ""}] * 2049}).encode(),
         "messages", 400),
        ("/v1/chat/completions",
         json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 4097}]}).encode(),
         "messages", 400),
    ],
    ids=["values", "prompts", "stop", "stop_token_ids", "messages", "parts"],
)  # fmt: skip
def test_counts_are_limited(http: httpx.Client, path: str, body: bytes, param: str | None, status: int) -> None:
    reply = http.post(path, content=body, headers=JSON)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text


# C13: addresses


@pytest.mark.parametrize("host", ["::", "", "localhost"])
def test_both_families_are_listened_on(host: str) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    listeners = listen(host, 0)
    families = {listener.family for listener in listeners}
    port = listeners[0].getsockname()[1]
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        if family in families or host != "localhost":
            socket.create_connection((address, port), timeout=10).close()
    for listener in listeners:
        listener.close()


# Operators' routes


def test_ready_says_why_not(http: httpx.Client, tiny_llama: Path) -> None:
    assert http.get("/ready").json() == {"ready": True, "reason": "the engine is ready"}

    async def main() -> httpx.Response:
        async with serving(tiny_llama) as (llm, _, _):
            transport = httpx.ASGITransport(create_app(Fleet.of(llm), draining=lambda: True))  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.get("/ready")

    reply = asyncio.run(main())
    assert reply.status_code == 503 and "shutting down" in reply.json()["reason"]
