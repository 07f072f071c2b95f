"""The audit log of a real server: what it says, and what happens when it cannot be written."""

import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from command_line import octavo
from server_process import COMPLETIONS, ServerProcess

KEY = os.urandom(32).hex()
BODY = b'{"model": "tiny", "prompt": "What is a module", "max_tokens": 8, "temperature": 0, "seed": 1}'
JSON = {"content-type": "application/json"}


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    (tmp_path / "key").write_text(KEY)
    return ["--audit-log", str(tmp_path / "audit.log"), "--audit-key", str(tmp_path / "key")]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def complete(server: ServerProcess, body: bytes = BODY, **headers: str) -> httpx.Response:
    return httpx.post(server.url + COMPLETIONS, content=body, headers={**JSON, **headers}, timeout=60)


def verdict(tmp_path: Path, *files: str) -> tuple[int, str]:
    done = octavo("audit", "verify", *(tmp_path / file for file in files), "--audit-key", tmp_path / "key")
    return done.returncode, done.stdout


def hash_of(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "content").write_bytes(content)
    return octavo("audit", "hash", tmp_path / "content", "--audit-key", tmp_path / "key").stdout.strip()


def test_who_asked_what_and_when(tiny_llama: Path, tmp_path: Path, flags: list[str]) -> None:
    added = octavo("keys", "add", "alice", "--tenant", "acme", "--keys", tmp_path / "keys.yaml")
    secret = next(word for word in added.stdout.split() if len(word) > 20)
    bearer = {"authorization": f"Bearer {secret}"}
    with ServerProcess(tiny_llama, *flags, "--keys", str(tmp_path / "keys.yaml")) as server:
        text = complete(server, **bearer).json()["choices"][0]["text"]
        stream = json.dumps(json.loads(BODY) | {"stream": True, "n": 2}).encode() + b" " * (1 << 19)
        assert complete(server, stream, **bearer).text.endswith("data: [DONE]\n\n")
        assert complete(server).status_code == 401
        background = {"model": "tiny", "input": "Say hello", "background": True, "max_output_tokens": 4}
        url = f"{server.url}/v1/responses"
        response = httpx.post(url, json=background, headers=bearer, timeout=60).json()
        while httpx.get(f"{url}/{response['id']}", headers=bearer).json()["status"] in ("queued", "in_progress"):
            time.sleep(0.01)
        assert httpx.get(f"{server.url}/health").status_code == 200
    first, *requests, last = lines(tmp_path / "audit.log")
    assert (first["event"], last["event"]) == ("start", "stop")
    one, two, refused, *rest = (line for line in requests if line["method"] == "POST")
    assert one["key"] == "alice" and one["tenant"] == "acme" and one["client"] == "127.0.0.1"
    assert (one["model"], one["completion_tokens"], one["finish_reasons"]) == ("tiny", 8, ["length"])
    assert one["request_hash"] == hash_of(tmp_path, BODY)
    assert two["request_hash"] == hash_of(tmp_path, stream)
    assert one["answer_hashes"] == [hash_of(tmp_path, text.encode())]
    assert two["answer_hashes"][0] == one["answer_hashes"][0] and len(two["answer_hashes"]) == 2
    assert refused["status"] == 401 and "key" not in refused
    [late] = rest
    assert late["path"] == "/v1/responses" and late["completion_tokens"] == 4 and len(late["answer_hashes"]) == 1
    assert secret not in (tmp_path / "audit.log").read_text() and "module" not in (tmp_path / "audit.log").read_text()
    assert verdict(tmp_path, "audit.log")[0] == 0
    changed = (tmp_path / "audit.log").read_text().replace('"key":"alice"', '"key":"bob"', 1)
    (tmp_path / "changed").write_text(changed)
    code, said = verdict(tmp_path, "changed")
    assert code == 2 and "changed:2: this line was changed" in said


def test_no_request_is_served_while_lines_cannot_be_written(tiny_llama: Path, tmp_path: Path, flags: list[str]) -> None:
    with ServerProcess(tiny_llama, *flags) as server:
        assert complete(server).status_code == 200
        wait_for(lambda: len(lines(tmp_path / "audit.log")) == 2)
        size = (tmp_path / "audit.log").stat().st_size
        limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
        assert complete(server).status_code == 200, "its line cannot be written, which nobody knows yet"
        wait_for(lambda: complete(server).status_code == 503)
        refused = complete(server)
        assert refused.json()["error"]["code"] == "audit_log_unavailable" and refused.headers["retry-after"] == "1"
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert (tmp_path / "audit.log").stat().st_size == size, "no half lines"
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
        wait_for(lambda: complete(server).status_code == 200)
    assert server.stderr().count("requests are refused") == 1 and "can be written again" in server.stderr()
    served = [line for line in lines(tmp_path / "audit.log") if line.get("status") == 200 and "request_hash" in line]
    assert len(served) >= 3 and verdict(tmp_path, "audit.log")[0] == 0


def test_a_kill_is_not_taken_for_tampering(tiny_llama: Path, tmp_path: Path, flags: list[str]) -> None:
    server = ServerProcess(tiny_llama, *flags).__enter__()
    complete(server)
    wait_for(lambda: len(lines(tmp_path / "audit.log")) == 2)
    server.signal(signal.SIGKILL)
    server.process.communicate()
    with (tmp_path / "audit.log").open("ab") as file:
        file.write(b'{"previous":"0123')
    with ServerProcess(tiny_llama, *flags) as server:
        complete(server)
    code, said = verdict(tmp_path, "audit.log")
    assert code == 0 and "1 torn by a kill" in said and "5 authentic lines" in said


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
