"""Three tenants and an attacker on a real server: no route gives away, changes or counts what is another tenant's.

The routes are those of the server's own OpenAPI document, which is made from its table of routes: a new one is tried
without a change here.
"""

import contextlib
import http.client
import itertools
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.tenants import key_ring
from octavo.tenants.key_file import add_key
from octavo.tenants.key_ring import KeyRing
from server_process import ServerProcess

MARK = "0f3a9c77e1"  # in everything that Alice sends
OPEN = {"/health", "/ready", "/"}
OPERATED = {"/stats", "/metrics", "/v1/admin/models"}
SHARED = {"/get_load"}  # the load of all tenants together: for keys of trusted proxies
COMPLETION = {"prompt": f"{MARK} is my secret", "max_tokens": 4, "ignore_eos": True}
ROW = {"custom_id": MARK, "method": "POST", "url": "/v1/completions", "body": COMPLETION}


@dataclass
class Site:
    """A server, its keys by name, and what Alice has stored on it, by kind."""

    server: ServerProcess
    http: httpx.Client
    folder: Path
    keys: dict[str, str]
    stored: dict[str, str] = field(default_factory=dict)
    operations: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    def send(self, who: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[who]}"} | options.pop("headers", {})
        return self.http.request(method, path, headers=headers, **options)

    def raw(self, who: str | None, target: str, *fields: str, method: str = "GET") -> tuple[int, bytes, list[Any]]:
        """Send a request for a target as it stands, without a client that would normalize it."""
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", *fields]
        lines += [f"Authorization: Bearer {self.keys[who]}"] if who else []
        with socket.create_connection(self.server.address, timeout=30) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
            reply = http.client.HTTPResponse(connection)
            reply.begin()
            return reply.status, reply.read(), reply.getheaders()


@pytest.fixture(scope="module")
def site(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    keys = {name: add_key(folder / "keys.yaml", name=name) for name in ("alice", "bob", "carol", "dora")}
    flags = ["--keys", str(folder / "keys.yaml"), "--data-dir", str(folder / "data"), "--enable-metrics"]
    flags += ["--admin-key", "root-key", "--api-key", "proxy-key", "--cors-origins", "https://a.example"]
    flags += ["--kv-disk", str(folder / "kv"), "--header-timeout", "2", "--body-timeout", "2"]
    with ServerProcess(tiny_llama, *flags) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        site = Site(server, http, folder, keys | {"root": "root-key", "proxy": "proxy-key", "eve": "sk-guess"})
        site.stored = _store(site)
        paths = site.send("bob", "GET", "/openapi.json").json()["paths"]
        site.operations = [(method.upper(), path, op) for path, ops in paths.items() for method, op in ops.items()]
        yield site


def _store(site: Site) -> dict[str, str]:
    """Store one object of each kind as Alice, and return their ids."""
    upload = {"file": (f"{MARK}.jsonl", json.dumps(ROW).encode() + b"\n")}
    file = site.send("alice", "POST", "/v1/files", files=upload, data={"purpose": "batch"}).json()["id"]
    order = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = site.send("alice", "POST", "/v1/batches", json=order | {"metadata": {"m": MARK}}).json()["id"]
    answer = {"input": MARK, "max_output_tokens": 16, "metadata": {"m": MARK}}
    response = site.send("alice", "POST", "/v1/responses", json=answer).json()["id"]
    background = site.send("alice", "POST", "/v1/responses", json=answer | {"background": True}).json()["id"]
    state = site.send("alice", "POST", "/v1/completions", json=COMPLETION | {"kv_cache_state": True}).json()
    chat = {"messages": [{"role": "user", "content": MARK}], "max_tokens": 4, "kv_cache_state": True}
    chat_state = site.send("alice", "POST", "/v1/chat/completions", json=chat).json()
    stored = {"file": file, "batch": batch, "response": response, "background": background}
    stored |= {"state": state["kv_cache_state"]["id"], "chat_state": chat_state["kv_cache_state"]["id"]}
    done = time.monotonic() + 30
    while (ended := site.send("alice", "GET", f"/v1/batches/{batch}").json())["status"] != "completed":
        assert time.monotonic() < done and ended["status"] in ("validating", "in_progress", "finalizing"), ended
        time.sleep(0.02)
    return stored | {"results": ended["output_file_id"]}


def _body(operation: dict[str, Any]) -> Any:
    """Return the example of an operation's body in its description."""
    for content in operation.get("requestBody", {}).get("content", {}).values():
        return content.get("example") or next(iter(content.get("examples", {}).values()), {}).get("value")
    return None


def test_no_route_answers_without_a_key(site: Site) -> None:
    assert len(site.operations) > 55
    for method, path, operation in site.operations:
        for who in (None, "eve"):
            headers = {"Authorization": f"Bearer {site.keys[who]}"} if who else {}
            target = re.sub(r"{\w+}", site.stored["file"], path)
            reply = site.http.request(method, target, headers=headers, json=_body(operation))
            assert reply.status_code == (200 if path in OPEN else 401), (method, path, reply.text)
            assert MARK not in reply.text
    for method, path, _ in site.operations:
        if path.startswith(tuple(OPERATED | SHARED)):
            assert site.send("bob", method, path).status_code in (401, 403), path
            assert site.send("bob", method, f"{path}%0A").status_code in (401, 403, 404), path
        if path in OPERATED | SHARED:
            assert site.send("root" if path in OPERATED else "proxy", method, path).status_code in (200, 415), path


def _attempts(site: Site, path: str, operation: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield targets and options of requests for `path` that try to reach what is Alice's."""
    ids = list(site.stored.values())
    targets = [re.sub(r"{\w+}", id, path) for id in ids] if "{" in path else [path]
    pretences: list[dict[str, Any]] = [
        {}, {"headers": {"X-Octavo-Tenant": "alice"}}, {"params": {"tenant": "alice", "limit": "100", "order": "asc"}},
    ]  # fmt: skip
    body = _body(operation)
    for target, pretence in itertools.product(targets, pretences):
        yield target, pretence | ({} if body is None else {"json": body})
    if isinstance(body, dict):
        for id in ids:
            for name in ("kv_cache_state", "previous_response_id", "input_file_id", "conversation", "file_id", "id"):
                yield targets[0], {"json": body | {name: id}}
                yield targets[0], {"json": body | {name: id, "tenant": "alice", "max_tokens": 4}}
        yield targets[0], {"json": body | {"tenant": "alice", "user": "alice"}}


def test_no_route_gives_a_tenant_what_is_anothers(site: Site) -> None:
    for method, path, operation in site.operations:
        if path in OPEN:
            continue
        for target, options in _attempts(site, path, operation):
            reply = site.send("bob", method, target, **options)
            where = (method, target, options, reply.text[:300])
            assert reply.status_code < 500 or reply.status_code == 501, where
            assert MARK not in reply.text and MARK not in str(reply.headers), where
            if "{id}" in path:
                assert reply.status_code in (404, 405), where
            if method == "GET" and "{" not in path:
                assert not any(id in reply.text for id in site.stored.values()), where
    for kind, path in KINDS.items():
        assert site.send("alice", "GET", f"{path}/{site.stored[kind]}").status_code == 200, kind
        for other in ("carol", "bob"):
            assert site.send(other, "GET", f"{path}/{site.stored[kind]}").status_code == 404
    assert MARK in site.send("alice", "GET", f"/v1/files/{site.stored['results']}/content").text
    background = site.send("alice", "GET", f"/v1/responses/{site.stored['background']}").json()
    assert background["status"] != "cancelled"


KINDS = {
    "file": "/v1/files", "results": "/v1/files", "batch": "/v1/batches", "response": "/v1/responses",
    "background": "/v1/responses", "state": "/v1/kv_cache_states", "chat_state": "/v1/kv_cache_states",
}  # fmt: skip


def test_what_continues_anothers_work_is_refused_by_name(site: Site) -> None:
    def refused(path: str, body: dict[str, Any]) -> int:
        mine = site.send("alice", "POST", path, json=body)
        assert mine.status_code == 200, mine.text
        return site.send("bob", "POST", path, json=body).status_code

    chat = {
        "messages": [{"role": "user", "content": "?"}],
        "max_tokens": 2,
        "kv_cache_state": site.stored["chat_state"],
    }
    answer = {"input": "?", "max_output_tokens": 16, "previous_response_id": site.stored["response"]}
    order = {"input_file_id": site.stored["file"], "endpoint": "/v1/completions", "completion_window": "24h"}
    assert refused("/v1/completions", COMPLETION | {"kv_cache_state": site.stored["state"]}) == 404
    assert refused("/v1/chat/completions", chat) == 404
    assert refused("/v1/responses", answer) == 404
    assert refused("/v1/responses/input_tokens", {k: answer[k] for k in ("input", "previous_response_id")}) == 404
    assert refused("/v1/batches", order) in (400, 404)


WORDS = "word " * 90
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/completions": ({"prompt": WORDS, "max_tokens": 1}, "usage.prompt_tokens_details.cached_tokens"),
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 1},
        "usage.prompt_tokens_details.cached_tokens",
    ),
    "/v1/responses": ({"input": WORDS, "max_output_tokens": 16}, "usage.input_tokens_details.cached_tokens"),
    "/v1/messages": (
        {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 1},
        "usage.cache_read_input_tokens",
    ),
}


@pytest.mark.parametrize("path", CALLS)
def test_no_tenants_prompt_is_cached_for_another(site: Site, path: str) -> None:
    body, where = CALLS[path]
    body = body | {"model": site.send("bob", "GET", "/v1/models").json()["data"][0]["id"], "cache_salt": path}
    body = {name: value for name, value in body.items() if name != "cache_salt" or path != "/v1/messages"}

    def cached(who: str, **more: Any) -> int:
        reply: Any = site.send(who, "POST", path, json=body, **more).json()
        for name in where.split("."):
            reply = reply[name]
        return int(reply)

    before = cached("alice")
    assert cached("alice") > max(before, 60)
    assert cached("dora") == cached("carol", headers={"X-Octavo-Tenant": "alice"}) == 0
    assert cached("proxy", headers={"X-Octavo-Tenant": "alice"}) > 60  # what Carol could not pretend


def test_keys_are_compared_by_hash_and_in_constant_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = add_key(tmp_path / "keys.yaml", name="alice")
    ring = KeyRing(["plain-key"], tmp_path / "keys.yaml")
    compared: list[int] = []

    def compare(one: str, other: str) -> bool:
        compared.append(len(one) + len(other))
        return one == other

    monkeypatch.setattr(key_ring.hmac, "compare_digest", compare)
    found = [ring.find(each) for each in (secret, "plain-key", secret[:-1], secret + "x", "")]
    assert [key and key.name for key in found] == ["alice", "api-key-1", None, None, None]
    assert compared == [128, 128]
    assert secret not in str(vars(ring)) and "plain-key" not in str(vars(ring))


# What is in a request's text


def _targets(site: Site) -> Iterator[str]:
    names = [str(path.relative_to(site.folder)) for path in site.folder.rglob("*") if path.is_file()]
    assert any("keys.yaml" in name for name in names)
    wanted = ["/etc/passwd", "etc/passwd", "keys.yaml", *names, *(name.partition("/")[2] for name in names)]
    ups = ["", "../", "../../", "../../../../../../../../", "./", "..\\", "....//", "/", "x/../", "file:///"]
    for base, up, name in itertools.product(("/v1/files", "/v1/responses", "/v1/kv_cache_states"), ups, wanted):
        plain = f"{up}{name}"
        encoded = "".join(f"%{ord(c):02x}" for c in plain)
        twice = encoded.replace("%", "%25")
        slashes = plain.replace("/", "%2f").replace("..", "%2e%2e")
        overlong = plain.replace("/", "%c0%af")
        for written in dict.fromkeys((plain, encoded, twice, slashes, overlong, f"{encoded}%00", f"%00{encoded}")):
            yield f"{base}/{written}"
            if up == "../":
                yield f"{base}/{written}/content"


def test_no_path_leaves_the_stored_files(site: Site) -> None:
    targets = list(_targets(site))
    with contextlib.closing(http.client.HTTPConnection(*site.server.address, timeout=30)) as connection:
        for target in targets[:: max(1, len(targets) // 1500)]:
            connection.putrequest("GET", target.encode("ascii", "ignore").decode(), skip_host=True)
            connection.putheader("Host", "localhost")
            connection.putheader("Authorization", f"Bearer {site.keys['bob']}")
            connection.endheaders()
            reply = connection.getresponse()
            content = reply.read()
            assert reply.status in (400, 404), (target, reply.status, content[:200])
            assert MARK.encode() not in content and b"root:" not in content and b"hash:" not in content, target
    for id in ("x" * 5000, "%00", "%0d%0a", "file-%00", f"{site.stored['file']}%00", f"{site.stored['file']}%2f.."):
        assert site.raw("alice", f"/v1/files/{id}")[0] in (400, 404), id


NASTY = "x\r\nX-Injected: 1\r\n\r\n<script>\x1b[2J\x1b]0;owned\x07\x00\x7f\u2028 status=200 key=root"


def _encoded(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


def test_no_text_of_a_client_gets_into_a_header_or_another_line_of_the_log(tiny_llama: Path, tmp_path: Path) -> None:
    keys = {"bob": add_key(tmp_path / "keys.yaml", name="bob"), "proxy": "proxy-key"}
    flags = ["--keys", str(tmp_path / "keys.yaml"), "--api-key", "proxy-key", "--cors-origins", "*"]
    flags += ["--data-dir", str(tmp_path / "data")]
    with ServerProcess(tiny_llama, *flags) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        site = Site(server, http, tmp_path, keys)
        count = _inject(site)
    assert server.process.stdout is not None
    lines = server.process.stdout.read().splitlines()
    lines = [line for line in lines if line]
    assert len(lines) == count
    for line in lines:
        assert line.isprintable(), line
        assert re.match(r"\S+Z 127\.0\.0\.1 \S+ (\"[^\"]*\"|\S+) \d{3} request_id=\S+ ", line), line
        bare = re.sub(r'"(\\.|[^"\\])*"', "", line)
        assert bare.count(" key=") <= 1 and "key=root" not in bare, line
    assert all(line.isprintable() for line in server.stderr().splitlines() if "Writing" not in line)


def _inject(site: Site) -> int:
    """Send NASTY wherever a request has text. Return the number of requests that the log should have."""
    count = 0
    header = (
        NASTY.replace("\r\n", "\r\n ").replace("\x00", "").replace("\u2028", "")
    )  # folded, as HTTP/1.1 once allowed
    for value in (header, "a\x1b[2Jb", "a\rX-Injected: 1", "a\nX-Injected: 1", "é" * 50, "a" * 3000):
        for name in ("X-Request-Id", "User-Agent", "X-Octavo-Tenant", "Origin", "Access-Control-Request-Headers"):
            for method in ("GET", "OPTIONS"):
                status, _, headers = site.raw("proxy", "/v1/models", f"{name}: {value}", method=method)
                assert not any(field.lower() == "x-injected" for field, _ in headers), (name, value)
                assert status in (200, 204, 400)
                count += 1
        site.raw(None, "/v1/models", f"Authorization: Bearer {value}")
        count += 1
    for start, text in itertools.product(("/", "/v1/files/", "/v1/models/"), (NASTY, "\x1b[2J", "a\r\nb", "\u202e")):
        status, _, headers = site.raw("bob", f"{start}{_encoded(text)}?a={_encoded(text)}")
        assert status == 404 and not any(field.lower() == "x-injected" for field, _ in headers)
        count += 1
    for body in ({"model": NASTY}, {"user": NASTY}, {"metadata": {"a": NASTY}}, {NASTY: 1}, {"tenant": NASTY}):
        reply = site.send("proxy", "POST", "/v1/completions", json={"prompt": NASTY, "max_tokens": 2} | body)
        assert reply.status_code in (200, 400, 404) and "x-injected" not in reply.headers
        count += 1
    upload = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\nContent-Disposition: form-data; '
    )
    upload += b'name="file"; filename="a\\r\\nX-Injected: 1%0d%0aX-Injected: 1"\r\n\r\n{}\r\n--b--\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    file = site.send("bob", "POST", "/v1/files", content=upload, headers=form).json()["id"]
    reply = site.send("bob", "GET", f"/v1/files/{file}/content")
    assert reply.content == b"{}" and "x-injected" not in reply.headers
    return count + 2


# Slow clients


def memory(server: ServerProcess) -> int:
    """Return the resident bytes of the server's process."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


@pytest.mark.parametrize("key", ["bob", "eve", None])
@pytest.mark.parametrize("part", ["header", "body"])
def test_slow_clients_delay_nobody(site: Site, key: str | None, part: str) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {site.keys[key]}\r\n" if key else ""
    head += f"Content-Length: {1 << 20}\r\n\r\n{{" if part == "body" else ""
    before, began = memory(site.server), time.monotonic()
    slow = [socket.create_connection(site.server.address, timeout=20) for _ in range(300)]
    for each in slow:
        each.sendall(head.encode())
    replies: dict[socket.socket, bytes] = dict.fromkeys(slow, b"")
    waits = []
    while slow:
        asked = time.monotonic()
        assert site.send("alice", "GET", "/v1/models").status_code == 200
        waits.append(time.monotonic() - asked)
        assert asked - began < 15, f"{len(slow)} slow clients are still connected"
        slow = [each for each in slow if _trickles(each, replies)]
    expected = b" 401 " if part == "body" and key != "bob" else b" 408 "
    assert all(reply.startswith(b"HTTP/1.1" + expected) for reply in replies.values()), set(replies.values())
    assert sorted(waits)[len(waits) // 2] < 1
    assert memory(site.server) - before < 32 << 20


def _trickles(connection: socket.socket, replies: dict[socket.socket, bytes]) -> bool:
    """Send one more byte. Return whether the connection is still open; else close it."""
    connection.setblocking(False)
    try:
        while part := connection.recv(65536):
            replies[connection] += part
        is_open = False
    except BlockingIOError:
        is_open = True
    except OSError:
        is_open = False
    if is_open and not replies[connection]:
        with contextlib.suppress(OSError):
            connection.send(b"x")
    if not is_open:
        connection.close()
    return is_open
