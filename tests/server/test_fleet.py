"""Several models in one real server: names, splits, loads on demand, and changes while requests run."""

import json
import os
import shutil
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from fleet_server import ADMIN, KEY, FleetServer, text_of, until

PROMPTS = ["Once upon a time", "The module", "A class", "print(", "1 2 3"]


@pytest.fixture(scope="module")
def models(tiny_model: Callable[[str], Path]) -> dict[str, str]:
    return {name: str(tiny_model(name)) for name in ("llama", "qwen2", "mistral", "qwen3")}


@pytest.fixture(scope="module")
def fleet(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetServer]:
    description = {
        "models": {
            "llama": {"model": models["llama"], "aliases": ["gpt-4o", "chat/default"]},
            "qwen": {"model": models["qwen2"], "replicas": 2},
            "late": {"model": models["mistral"], "load_on_demand": True},
        },
        "splits": {"ab": {"llama": 75, "qwen": 25}, "sticky": {"llama": 50, "qwen": 50, "sticky": "user"}},
        "memory": "8GiB",
    }
    with FleetServer(tmp_path_factory.mktemp("fleet"), description, "--max-batch-size", "16") as server:
        yield server


def test_names_aliases_and_states(fleet: FleetServer, models: dict[str, str]) -> None:
    entries = fleet.models()
    assert list(entries) == ["llama", "qwen", "late", "gpt-4o", "chat/default", "ab", "sticky"]
    llama, alias, late, split = entries["llama"], entries["gpt-4o"], entries["late"], entries["ab"]
    assert llama["aliases"] == ["gpt-4o", "chat/default"] and llama["root"] == models["llama"]
    assert llama["state"] == "loaded" and llama["max_model_len"] == 512
    assert alias["parent"] == "llama" and alias["root"] == models["llama"]
    assert late["state"] == "unloaded" and split["shares"] == {"llama": 75, "qwen": 25}
    assert fleet.http.get("/v1/models/chat/default").json() == entries["chat/default"]
    assert fleet.http.get("/v1/models/nothing").status_code == 404
    assert fleet.http.get("/ready").json() == {"ready": True, "reason": "2 of 3 models are loaded"}


def test_requests_reach_the_model_that_they_name(fleet: FleetServer) -> None:
    replies = {name: fleet.complete(name) for name in (None, "llama", "gpt-4o", "chat/default", "qwen")}
    texts = {name: text_of(reply) for name, reply in replies.items()}
    assert len({texts[name] for name in (None, "llama", "gpt-4o", "chat/default")}) == 1
    assert texts["qwen"] != texts["llama"]
    assert replies["gpt-4o"].json()["model"] == "llama"
    chat = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert fleet.http.post("/v1/chat/completions", json=chat).json()["model"] == "llama"
    wrong = fleet.complete("lama")
    assert wrong.status_code == 404 and wrong.json()["error"]["code"] == "model_not_found"
    assert "'lama' is not served here; 'llama', 'qwen', 'late' are" in wrong.json()["error"]["message"]


def test_splits(fleet: FleetServer) -> None:
    counts = Counter(fleet.complete("ab", max_tokens=1).json()["model"] for _ in range(8))
    assert counts == {"llama": 6, "qwen": 2}
    sides = {}
    for number in range(8):
        user = f"user {number}"
        fields = ("user", "safety_identifier", "user")
        served = {fleet.complete("sticky", max_tokens=1, **{name: user}).json()["model"] for name in fields}
        [sides[user]] = served
    assert set(sides.values()) == {"llama", "qwen"}


def test_a_state_through_a_split_stays_with_its_model(fleet: FleetServer) -> None:
    """A split divides conversations, not their turns."""
    for _ in range(4):
        reply = fleet.complete("ab", kv_cache_state=True).json()
        for _ in range(3):
            again = fleet.complete("ab", prompt=" and", kv_cache_state=reply["kv_cache_state"]["id"])
            assert again.status_code == 200 and again.json()["model"] == reply["model"]


def test_on_demand(fleet: FleetServer) -> None:
    """Several requests at once for a model that is not loaded, of which one does not wait long enough."""
    fleet.hold_loads()
    with ThreadPoolExecutor(4) as threads:
        patient = [threads.submit(fleet.complete, "late") for _ in range(3)]
        assert threads.submit(fleet.complete, "late", timeout=0.05).result().status_code == 504
        until(lambda: fleet.state("late") == "loading")
        assert fleet.complete("llama").status_code == 200
        fleet.let_load()
        assert len({text_of(reply.result()) for reply in patient}) == 1
    assert fleet.state("late") == "loaded"
    assert fleet.change("unload", "late").json() == {"name": "late", "state": "unloaded"}
    assert fleet.complete("late").status_code == 200  # unloaded by hand, it still is one that is loaded on demand
    fleet.change("unload", "late")


def test_states_survive_the_unloading_of_their_model(fleet: FleetServer) -> None:
    first = fleet.complete("llama", kv_cache_state=True).json()
    handle = first["kv_cache_state"]["id"]
    expected = text_of(fleet.complete("llama", prompt=" and", kv_cache_state=handle))
    assert fleet.change("unload", "llama").json()["state"] == "unloaded"
    assert fleet.http.get(f"/v1/kv_cache_states/{handle}").json()["tokens"] == first["kv_cache_state"]["tokens"]
    refused = fleet.complete("llama")
    assert refused.status_code == 503 and "octavo models load llama" in refused.json()["error"]["message"]
    assert fleet.change("load", "llama").json() == {"name": "llama", "state": "loaded"}
    assert text_of(fleet.complete("llama", prompt=" and", kv_cache_state=handle)) == expected


def test_states_survive_the_death_of_a_replica(fleet: FleetServer) -> None:
    before = next(entry for entry in stats(fleet) if entry["name"] == "qwen")["replicas"]
    handle = fleet.complete("qwen", kv_cache_state=True).json()["kv_cache_state"]["id"]
    expected = text_of(fleet.complete("qwen", prompt=" and", kv_cache_state=handle))
    for replica in before:
        os.kill(replica["pid"], signal.SIGKILL)
        assert text_of(fleet.complete("qwen", prompt=" and", kv_cache_state=handle)) == expected


def stats(fleet: FleetServer) -> list[dict[str, Any]]:
    return fleet.http.get("/stats").json()["models"]  # type: ignore[no-any-return]


class Streams:
    """Clients that stream one completion after another, until the `with` block ends."""

    def __init__(self, fleet: FleetServer, model: str, count: int, tokens: int = 40):
        self._fleet, self._model, self._count, self._tokens = fleet, model, count, tokens
        self._stop = threading.Event()
        self.texts: list[tuple[str, str]] = []  # prompt, text

    def __enter__(self) -> "Streams":
        self._threads = ThreadPoolExecutor(self._count)
        self._clients = [self._threads.submit(self._run, number) for number in range(self._count)]
        return self

    def until_served(self, count: int) -> None:
        """Wait for so many further completions."""
        goal = len(self.texts) + count
        until(lambda: len(self.texts) >= goal or any(client.done() for client in self._clients))

    def __exit__(self, kind: Any, *_: object) -> None:
        self._stop.set()
        self._threads.shutdown()
        if kind is None:
            for client in self._clients:
                client.result()

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self._fleet.url, timeout=60) as http:
            while not self._stop.is_set():
                prompt = PROMPTS[number % len(PROMPTS)]
                number += 1
                text = stream(http, self._model, prompt, self._tokens)
                self.texts.append((prompt, text))


def stream(http: httpx.Client, model: str, prompt: str, tokens: int) -> str:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    text, ended = "", False
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line:
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                text += choice["text"]
    assert ended
    return text


def answers(fleet: FleetServer, model: str, tokens: int = 40) -> dict[str, str]:
    return {prompt: text_of(fleet.complete(model, prompt, max_tokens=tokens)) for prompt in PROMPTS}


def test_a_swap_under_load(fleet: FleetServer, models: dict[str, str], many: bool) -> None:
    """Every stream is wholly the old model's or wholly the new one's; also while the old one's engine is killed."""
    rounds = 10 if many else 2
    names = [models["qwen3"], models["llama"]]
    for number in range(rounds):
        old = answers(fleet, "llama")
        with Streams(fleet, "llama", 8) as streams:
            streams.until_served(4)
            with ThreadPoolExecutor(1) as thread:
                swap = thread.submit(fleet.change, "swap", "llama", model=names[number % 2])
                while number % 2 and not swap.done():
                    loaded = [
                        entry for entry in stats(fleet) if entry["name"] == "llama" and entry["state"] == "loaded"
                    ]
                    for replica in loaded[0]["replicas"]:  # of the old one, while both are loaded for a moment
                        os.kill(replica["pid"], signal.SIGKILL)
                    streams.until_served(1)
            assert swap.result().json() == {"name": "llama", "state": "loaded"}, swap.result().text
            streams.until_served(8)
        new = answers(fleet, "llama")
        assert new != old
        for prompt, text in streams.texts:
            assert text in (old[prompt], new[prompt])
        assert {text for _, text in streams.texts} & set(new.values())
        until(lambda: [entry["name"] for entry in stats(fleet)].count("llama") == 1)  # the old one has ended
        assert fleet.models()["gpt-4o"]["parent"] == "llama"


@pytest.fixture(scope="module")
def wrong_models(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wrong")
    damaged, unknown = (Path(shutil.copytree(models["llama"], folder / name)) for name in ("damaged", "unknown"))
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[:-1000])
    config = json.loads((unknown / "config.json").read_text()) | {"architectures": ["Oracle"], "model_type": "oracle"}
    (unknown / "config.json").write_text(json.dumps(config))
    nan = Path(shutil.copytree(models["llama"], folder / "nan"))
    (nan / "model.safetensors").write_bytes(weights[:-4000] + b"\xff" * 4000)
    return {"damaged": damaged, "unknown": unknown, "nan": nan, "absent": folder / "absent"}


@pytest.mark.parametrize(
    ("wrong", "settings", "message"),
    [
        ("damaged", {}, ""),
        ("unknown", {}, "Oracle"),
        ("nan", {}, ""),
        ("absent", {}, "absent"),
        ("", {"kv_cache_memory": "20GiB"}, "memory budget of 8.00 GiB leaves 7.75 GiB for models"),
        ("", {"max_batchsize": 4}, "did you mean max_batch_size?"),
        ("", {"aliases": ["llama"]}, "the name 'llama' is taken"),
        ("", {"aliases": ["qwen"]}, "two of the names 'qwen', 'qwen' are the same"),
        ("", {"aliases": ["ab"]}, "the name 'ab' is taken"),
        ("", {"replicas": 0}, "from 1 to 256"),
    ],
)
def test_a_model_that_cannot_replace_another_leaves_it_serving(
    fleet: FleetServer, models: dict[str, str], wrong_models: dict[str, Path], wrong: str, settings: Any, message: str
) -> None:
    before, names, engines = fleet.complete("qwen"), fleet.models(), fleet.engine_pids()
    reply = fleet.change("swap", "qwen", model=str(wrong_models.get(wrong, models["llama"])), settings=settings)
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]["message"]
    assert text_of(fleet.complete("qwen")) == text_of(before)
    assert fleet.models() == names and fleet.engine_pids() == engines


def test_a_new_model(fleet: FleetServer, models: dict[str, str], wrong_models: dict[str, Path]) -> None:
    assert fleet.change("load", "new", model=str(wrong_models["damaged"])).status_code == 400
    assert "new" not in fleet.models()
    reply = fleet.change("load", "new", model=models["qwen3"], settings={"aliases": "newer,newest", "threads": "1"})
    assert reply.json() == {"name": "new", "state": "loaded"}
    assert text_of(fleet.complete("newest")) == text_of(fleet.complete("new"))
    assert fleet.change("load", "new").json()["state"] == "loaded"  # it is
    again = fleet.change("load", "new", model=models["llama"])
    assert again.status_code == 400 and "swap" in again.json()["error"]["message"]
    fleet.change("unload", "new")


def test_two_changes_at_once(fleet: FleetServer, models: dict[str, str]) -> None:
    fleet.hold_loads()
    with ThreadPoolExecutor(1) as thread:
        swap = thread.submit(fleet.change, "swap", "llama", model=models["llama"])
        fleet.until_loading()
        for action, more in (("swap", {"model": models["qwen3"]}), ("load", {}), ("unload", {})):
            other = fleet.change(action, "llama", **more)
            assert other.status_code == 409 and other.json()["error"]["code"] == "model_busy"
        assert fleet.complete("llama").status_code == 200
        fleet.let_load()
        assert swap.result().json() == {"name": "llama", "state": "loaded"}


def test_unloading_what_runs(fleet: FleetServer) -> None:
    """Running streams end; new requests are refused at once."""
    with httpx.Client(base_url=fleet.url, timeout=60) as http, ThreadPoolExecutor(5) as threads:
        streams = [threads.submit(stream, http, "qwen", "Once", 400) for _ in range(4)]
        until(lambda: any(entry["frontend"]["live"] == 4 for entry in stats(fleet) if entry["frontend"]))
        unload = threads.submit(fleet.change, "unload", "qwen")
        until(lambda: fleet.state("qwen") == "draining")
        assert fleet.complete("qwen").status_code == 503
        assert unload.result().json()["state"] == "unloaded"
        assert len({each.result() for each in streams}) == 1
    assert not any(entry["replicas"] for entry in stats(fleet) if entry["name"] == "qwen")
    assert fleet.change("load", "qwen").json()["state"] == "loaded"


def test_scaling_under_load(fleet: FleetServer) -> None:
    """Streams go on when engines are added and drained; a budget that does not have another engine refuses it."""
    prompt, expected = next(iter(answers(fleet, "qwen", 300).items()))
    with httpx.Client(base_url=fleet.url, timeout=60) as http, ThreadPoolExecutor(8) as threads:
        streams = [threads.submit(stream, http, "qwen", prompt, 300) for _ in range(8)]
        for replicas in (1, 3, 2):
            assert fleet.change("scale", "qwen", replicas=replicas).status_code == 200
            [entry] = [entry for entry in stats(fleet) if entry["name"] == "qwen"]
            assert [replica["is_ready"] for replica in entry["replicas"]] == [True] * replicas
        assert {each.result() for each in streams} == {expected}
    reply = fleet.change("scale", "qwen", replicas=200)
    assert reply.status_code == 400 and "memory budget does not have" in reply.json()["error"]["message"]
    for body in ({}, {"replicas": 0}, {"replicas": 2, "model": "x"}):
        assert fleet.change("scale", "qwen", **body).status_code == 400
    assert fleet.change("load", "qwen", replicas=2).status_code == 400


def test_unloading_what_is_loading(fleet: FleetServer) -> None:
    """On demand: its requests go on waiting, and are served by the next load."""
    fleet.hold_loads()
    engines = fleet.engine_pids()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(fleet.complete, "late")
        fleet.until_loading()
        fleet.change("unload", "late")
        fleet.let_load()
        assert waiting.result().status_code == 200
    assert fleet.change("unload", "late").json()["state"] == "unloaded"
    assert fleet.engine_pids() == engines


def test_a_client_that_leaves(fleet: FleetServer, models: dict[str, str]) -> None:
    """A change goes on; a request that waits for a load is forgotten."""
    fleet.hold_loads()
    with post(fleet, "/v1/admin/models", {"action": "swap", "name": "qwen", "model": models["llama"]}):
        fleet.until_loading()
    for _ in range(3):
        with post(fleet, "/v1/completions", {"model": "late", "prompt": "x", "stream": True}):
            until(lambda: fleet.state("late") == "loading")
    fleet.let_load()
    until(lambda: fleet.models()["qwen"]["root"] == models["llama"])
    fleet.until_state("late", "loaded")
    assert fleet.change("unload", "late").json()["state"] == "unloaded"  # nobody uses it
    assert fleet.change("swap", "qwen", model=models["qwen2"]).status_code == 200


def post(fleet: FleetServer, path: str, body: Any) -> socket.socket:
    connection = socket.create_connection(fleet.address)
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    ]
    head = "\r\n".join(lines) + "\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"action": "load", "name": "nobody"}, 404, "there is no model 'nobody'; there are llama, qwen, late"),
        ({"action": "unload", "name": "nobody"}, 404, "there is no model 'nobody'"),
        ({"action": "swap", "name": "nobody", "model": "x"}, 404, "there is no model 'nobody'"),
        ({"action": "unload", "name": "gpt-4o"}, 404, "there is no model 'gpt-4o'"),
        ({"action": "swap", "name": "llama"}, 400, "swap needs the model"),
        ({"action": "unload", "name": "llama", "model": "x"}, 400, "unload does not take model"),
        ({"action": "destroy", "name": "llama"}, 400, "Invalid enum value 'destroy'"),
        ({"action": "load", "name": 5}, 400, "Expected `str`, got `int`"),
        ({"action": "load", "name": "a\nb", "model": "x"}, 400, "printable"),
        ({"action": "load", "name": "llama", "force": True}, 400, "unknown field `force`"),
        ({"action": "load", "name": "x", "model": "y", "settings": {"model": "z", "n": 1}}, 400, "unknown setting 'n'"),
        ([], 400, "Expected `object`"),
    ],
)
def test_wrong_changes(fleet: FleetServer, body: Any, status: int, message: str) -> None:
    reply = fleet.http.post("/v1/admin/models", json=body, headers=ADMIN)
    assert reply.status_code == status, reply.text
    assert message in reply.json()["error"]["message"]


def test_the_admin_key(fleet: FleetServer, server: Any) -> None:
    url = "/v1/admin/models"
    body = {"action": "unload", "name": "llama"}
    for wrong in ("", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer", f"Bearer {KEY} x", "Bearer é".encode()):
        for reply in (
            fleet.http.post(url, json=body, headers={"Authorization": wrong}),
            fleet.http.get(url, headers={"Authorization": wrong}),
        ):
            assert reply.status_code == 401, reply.text
            assert KEY not in reply.text
    assert [entry["name"] for entry in fleet.http.get(url, headers=ADMIN).json()["models"]][:2] == ["llama", "qwen"]
    assert fleet.http.get(url, headers={"Authorization": f"bearer  {KEY}"}).status_code == 200
    off = httpx.post(f"{server.url}/v1/admin/models", json=body, headers=ADMIN)  # a server without a key
    assert off.status_code == 403 and "--admin-key" in off.json()["error"]["message"]
    assert KEY not in fleet.stderr() + fleet.http.get("/stats").text
