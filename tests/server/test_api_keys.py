"""API keys on a real server: who is served, whose data it is, and what the log shows."""

import contextlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import httpx
import openai
import pytest

from octavo.tenants.key_file import add_key, rotate_key
from server_process import ServerProcess

OCTAVO = [sys.executable, "-c", "from octavo.cli import main; main()"]
HELLO: Any = [{"role": "user", "content": "Hello"}]


class Guarded(NamedTuple):
    server: ServerProcess
    keys: Path
    secrets: dict[str, str]
    model: str

    def client(self, name: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=self.secrets.get(name, name), max_retries=0)

    def send(self, name: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.secrets.get(name, name)}"} | options.pop("headers", {})
        return httpx.request(method, self.server.url + path, headers=headers, timeout=30, **options)


@pytest.fixture(scope="module")
def guarded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys.yaml"
    fields: dict[str, dict[str, Any]] = {
        "alice": {"tenant": "team-a"}, "ann": {"tenant": "team-a"}, "bob": {},
        "other-model": {"models": ["another"]}, "slow": {"requests_per_minute": 2}, "modest": {"min_priority": 0},
    }  # fmt: skip
    secrets = {name: add_key(keys, name=name, **each) for name, each in fields.items()}
    flags = ["--keys", str(keys), "--api-key", "proxy-key", "--admin-key", "root", "--enable-metrics"]
    with ServerProcess(tiny_llama, *flags, "--data-dir", str(folder / "data")) as server:
        model = httpx.get(f"{server.url}/v1/models", headers={"x-api-key": secrets["bob"]}).json()["data"][0]["id"]
        yield Guarded(server, keys, secrets | {"proxy": "proxy-key"}, model)


def test_every_route_but_the_probes_needs_a_key(guarded: Guarded) -> None:
    paths = guarded.send("bob", "GET", "/openapi.json").json()["paths"]
    assert len(paths) > 40
    for path, methods in paths.items():
        for method in methods:
            reply = httpx.request(method, guarded.server.url + path.replace("{id}", "x"))
            open = path in ("/health", "/ready", "/")
            assert (reply.status_code == 200) if open else reply.status_code == 401, (method, path, reply.text)
    for path in (
        "/docs",
        "/nothing",
        "/page/",
        "/page/nothing.js",
        "/v1/../health",
        "//health",
        "/health/../v1/models",
        "/%2e%2e/health",
    ):
        with contextlib.closing(http.client.HTTPConnection(*guarded.server.address)) as connection:
            connection.request("GET", path)  # as it stands: httpx would resolve the dots
            assert connection.getresponse().status == 401, path
    for path in ("/stats", "/metrics", "/v1/admin/models"):
        assert guarded.send("bob", "GET", path).status_code == guarded.send("proxy", "GET", path).status_code == 401
        assert guarded.send("root", "GET", path).status_code == 200


def test_errors_have_the_form_of_each_api(guarded: Guarded) -> None:
    with pytest.raises(openai.AuthenticationError) as error:
        guarded.client("sk-wrong").models.list()
    assert (error.value.code, error.value.response.headers["www-authenticate"]) == ("invalid_api_key", "Bearer")
    wrong = anthropic.Anthropic(base_url=guarded.server.url, api_key="sk-wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
        wrong.messages.create(model=guarded.model, max_tokens=3, messages=HELLO)
    right = anthropic.Anthropic(base_url=guarded.server.url, api_key=guarded.secrets["alice"])
    assert right.messages.create(model=guarded.model, max_tokens=3, messages=HELLO).usage.output_tokens == 3
    assert "error" in httpx.get(f"{guarded.server.url}/api/tags").json()


def test_no_tenant_sees_what_is_anothers(guarded: Guarded) -> None:
    alice, ann, bob = (guarded.client(name) for name in ("alice", "ann", "bob"))
    file = alice.files.create(file=("a.jsonl", b'{"a": 1}\n'), purpose="user_data").id
    response = alice.responses.create(model=guarded.model, input="Hello", max_output_tokens=16).id
    state = guarded.send(
        "alice", "POST", "/v1/completions",
        json={"model": guarded.model, "prompt": "Hello there", "max_tokens": 3, "kv_cache_state": True},
    ).json()["kv_cache_state"]["id"]  # fmt: skip
    paths = (
        f"/v1/files/{file}",
        f"/v1/files/{file}/content",
        f"/v1/responses/{response}",
        f"/v1/kv_cache_states/{state}",
    )
    for path in paths:
        assert guarded.send("ann", "GET", path).status_code == 200, path  # a key of the same tenant
        for pretence in ({}, {"headers": {"X-Octavo-Tenant": "team-a"}}, {"params": {"tenant": "team-a"}}):
            assert guarded.send("bob", "GET", path, **pretence).status_code == 404, path
            assert guarded.send("bob", "DELETE", path.removesuffix("/content"), **pretence).status_code == 404
        assert guarded.send("proxy", "GET", path, headers={"X-Octavo-Tenant": "team-a"}).status_code == 200
    assert [each.id for each in ann.files.list()] == [file] and not list(bob.files.list())
    with pytest.raises(openai.NotFoundError):
        bob.responses.create(model=guarded.model, input="And?", previous_response_id=response)
    body = {"model": guarded.model, "prompt": "x", "max_tokens": 2, "kv_cache_state": state}
    assert guarded.send("bob", "POST", "/v1/completions", json=body | {"tenant": "team-a"}).status_code == 404
    assert guarded.send("ann", "POST", "/v1/completions", json=body).status_code == 200


def test_the_prefix_cache_is_the_tenants(guarded: Guarded) -> None:
    def cached(name: str, **more: Any) -> int:
        body = {"model": guarded.model, "prompt": "word " * 90, "max_tokens": 1} | more
        usage = guarded.send(name, "POST", "/v1/completions", json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached("alice") == 0
    assert cached("ann") > 60
    assert cached("bob", tenant="team-a") == 0


def test_what_a_key_does_not_allow(guarded: Guarded) -> None:
    with pytest.raises(openai.PermissionDeniedError) as error:
        guarded.client("other-model").completions.create(model=guarded.model, prompt="x", max_tokens=2)
    assert error.value.code == "model_not_allowed"
    batch = {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"}
    assert guarded.send("other-model", "POST", "/v1/batches", json=batch).status_code == 403
    body = {"model": guarded.model, "prompt": "x", "max_tokens": 2}
    assert guarded.send("modest", "POST", "/v1/completions", json=body | {"priority": -1}).status_code == 403
    assert guarded.send("modest", "POST", "/v1/completions", json=body | {"priority": 3}).status_code == 200
    slow = guarded.client("slow").completions.with_raw_response
    remaining = [slow.create(**body).headers["x-ratelimit-remaining-requests"] for _ in range(2)]
    assert remaining == ["1", "0"]
    with pytest.raises(openai.RateLimitError) as limit:
        slow.create(**body)
    assert 0 < int(limit.value.response.headers["retry-after"]) <= 60


def test_a_batch_runs_as_its_tenants(guarded: Guarded) -> None:
    alice = guarded.client("alice")
    line = {
        "custom_id": "1",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": guarded.model, "prompt": "x"},
    }
    file = alice.files.create(file=("rows.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = alice.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        guarded.client("bob").batches.cancel(batch.id)
    end = time.monotonic() + 30
    while (batch := alice.batches.retrieve(batch.id)).status != "completed":
        assert time.monotonic() < end and batch.status in ("validating", "in_progress", "finalizing")
        time.sleep(0.02)
    assert batch.request_counts is not None and batch.request_counts.completed == 1


def test_keys_change_while_the_server_runs(guarded: Guarded) -> None:
    def octavo(*arguments: object) -> str:
        command = [*OCTAVO, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    secret = octavo("keys", "add", "dora", "--keys", guarded.keys, "--requests-per-minute", "30").strip()
    assert "dora" in (listed := octavo("keys", "list", "--keys", guarded.keys)) and secret not in listed
    end = time.monotonic() + 10
    while guarded.send(secret, "GET", "/v1/models").status_code == 401:
        assert time.monotonic() < end
        time.sleep(0.02)
    fresh = rotate_key(guarded.keys, "dora")
    while guarded.send(fresh, "GET", "/v1/models").status_code == 401:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert guarded.send(secret, "GET", "/v1/models").status_code == 401
    octavo("keys", "revoke", "dora", "--keys", guarded.keys)
    while guarded.send(fresh, "GET", "/v1/models").status_code == 200:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert guarded.model in octavo("models", "list", "--url", guarded.server.url, "--admin-key", "root")
    assert "octavo" in octavo("top", "--once", "--url", guarded.server.url, "--admin-key", "root").lower()


def test_the_log_names_keys_and_never_shows_one(tiny_llama: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    secret = add_key(keys, name="alice")
    with ServerProcess(tiny_llama, "--keys", str(keys), "--api-key", "plain-key", "--admin-key", "root-key") as server:
        for sent in (secret, "plain-key", "root-key", "sk-wrong-and-secret"):
            for path in ("/v1/models", "/stats", "/nothing"):
                httpx.get(server.url + path, headers={"Authorization": f"Bearer {sent}", "x-api-key": sent})
    assert server.process.stdout is not None
    assert "-H 'Authorization: Bearer KEY'" in server.banner
    log = server.banner + server.process.stdout.read() + server.stderr()
    assert "key=alice" in log and "error=invalid_api_key" in log
    for sent in (secret, "plain-key", "root-key", "sk-wrong-and-secret"):
        assert sent not in log
