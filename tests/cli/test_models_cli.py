"""octavo models and octavo top against a real server of several models."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from command_line import Terminal, answer, complaint
from fleet_server import KEY, FleetServer, until

ENDLESS = {"prompt": ["a"] * 8, "n": 128, "max_tokens": 480, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def fleet(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetServer]:
    models = {
        "one": {"model": str(folder), "aliases": ["uno", "ein"]},
        "two": {"model": str(folder), "replicas": 2},
        "late": {"model": str(folder), "load_on_demand": True},
    }
    with FleetServer(tmp_path_factory.mktemp("fleet"), {"models": models, "memory": "8GiB"}) as server:
        yield server


@pytest.fixture
def change(fleet: FleetServer) -> Callable[..., str]:
    """Run octavo models with the key; returns what it prints."""

    def change(*arguments: str | Path, run: Callable[..., Any] = answer) -> str:
        return str(run("models", *arguments, "--url", fleet.url, OCTAVO_ADMIN_KEY=KEY))

    return change


def test_listing(fleet: FleetServer) -> None:
    lines = answer("models", "list", "--url", fleet.url.removeprefix("http://"), COLUMNS="200").splitlines()
    rows = {words[0]: line for line in lines if (words := line.split())}
    assert list(rows) == ["model", "one", "two", "late"]
    assert re.search(r"uno, ein +loaded +1 of 1 ready +0 +\d+ MiB", rows["one"])
    assert "2 of 2 ready" in rows["two"] and "unloaded" in rows["late"]


def test_changes(fleet: FleetServer, change: Callable[..., str], folder: Path) -> None:
    assert change("load", "late") == "late is loaded\n"
    assert change("unload", "late") == "late is unloaded\n"
    assert change("load", "new", "--model", folder, "--set", "max_batch_size=3", "--set", "aliases=newer,newest") == (
        "new is loaded\n"
    )
    assert fleet.models()["newest"]["parent"] == "new"
    assert change("swap", "new", folder, "--set", "max_num_seqs=5") == "new is loaded\n"
    [new] = [entry for entry in fleet.http.get("/stats").json()["models"] if entry["name"] == "new" and entry["limits"]]
    assert new["limits"]["max_batch_size"] == 5 and new["aliases"] == ["newer", "newest"]
    assert change("scale", "new", "2") == "new is loaded\n"
    assert change("unload", "new") == "new is unloaded\n"


def test_mistakes(fleet: FleetServer, change: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    wrong = lambda *arguments: change(*arguments, run=complaint)  # noqa: E731
    assert "there is no model 'none'; there are one, two, late" in wrong("load", "none")
    assert "absent" in wrong("swap", "one", "absent")
    assert "did you mean max_batch_size?" in wrong("swap", "one", folder, "--set", "max_batchsize=3")
    assert "--set takes NAME=VALUE, not 'fast'" in wrong("swap", "one", folder, "--set", "fast")
    assert "there is a model 'one' already" in wrong("load", "one", "--model", folder)
    assert fleet.models()["one"]["state"] == "loaded"
    no_key = complaint("models", "unload", "one", "--url", fleet.url)
    assert "--admin-key" in no_key and "OCTAVO_ADMIN_KEY" in no_key
    assert "--admin-key" in complaint("models", "unload", "one", "--url", fleet.url, "--admin-key", "wrong")
    assert "must be printable ASCII" in complaint("models", "unload", "one", "--admin-key", "é\n")
    assert fleet.models()["one"]["state"] == "loaded"


@pytest.mark.parametrize(
    ("url", "message"), [("http://127.0.0.1:9", "start one with octavo serve"), ("nonsense:80:90", "Invalid port")]
)
def test_no_server(url: str, message: str) -> None:
    assert message in complaint("models", "list", "--url", url)
    assert message in complaint("models", "load", "a", "--url", url)


def test_another_server(fleet: FleetServer) -> None:
    assert "GET /v1/stats" in complaint("models", "list", "--url", f"{fleet.url}/v1")
    assert "POST /v1/v1/admin/models" in complaint("models", "load", "one", "--url", f"{fleet.url}/v1")


def test_ctrl_c_leaves_a_load_to_the_server(fleet: FleetServer) -> None:
    fleet.hold_loads()
    terminal = Terminal("models", "load", "late", "--url", fleet.url, "--admin-key", KEY)
    try:
        terminal.wait_for("late: the engine is loading|late is loading")
        fleet.until_loading()
        terminal.type("\x03")
        assert terminal.process.wait(timeout=20) != 0
    finally:
        terminal.close()
        fleet.let_load()
    fleet.until_state("late", "loaded")
    fleet.change("unload", "late")


def test_top(fleet: FleetServer) -> None:
    """Two models, one of which has an engine that is dead."""
    fleet.hold_loads()  # the one that replaces it waits
    entry = next(entry for entry in fleet.http.get("/stats").json()["models"] if entry["name"] == "two")
    pid = entry["replicas"][0]["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: pid not in fleet.engine_pids())
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=ENDLESS | {"model": "two"}, timeout=60) as running:
        assert running.status_code == 200
        first = answer("top", "--once", "--url", fleet.url, COLUMNS="120")
        second = answer("top", "--once", "--model", "two", "--url", fleet.url, COLUMNS="120")
    fleet.let_load()
    assert re.search(r"octavo top +one · fcfs", first) and re.search(r"octavo top +two · fcfs", second)
    for shown in (first, second):
        assert re.search(r"one +the engine +ready +0 +0 +0 ", shown), shown
        assert re.search(r"two +engine 0 +the engine (is loading|ended)", shown), shown
        assert re.search(r"two +engine 1 +ready +[1-9]\d* +\d+ +[1-9]", shown), shown
        assert re.search(r"late +unloaded", shown), shown
    assert " of 512 running" in second  # of both engines
    assert "unloaded" in answer("top", "--once", "--model", "late", "--url", fleet.url)
    assert "no model 'three'; it has one, two, late" in complaint(
        "top", "--once", "--model", "three", "--url", fleet.url
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "--model", "b"), "two models are given, a and --model b"),
        (("a", "--models", "f"), "two kinds of models are given, a and --models"),
        (("a", "b", "--served-model-name", "c"), "served_model_name is for one model"),
        (("--models", "absent.yaml"), "cannot read absent.yaml"),
        (("a", "a"), "have the name 'a'"),
        (("absent-a", "absent-b"), "absent-a"),
        (("a", "b", "--admin-key", "ö"), "admin_key must be printable ASCII without spaces, not ***"),
    ],
)
def test_serving_models_wrongly(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in complaint("serve", *arguments, "--port", "0", HF_HUB_OFFLINE="1")


def test_serving_several_models_by_their_paths(folder: Path, tiny_model: Callable[[str], Path]) -> None:
    from server_process import ServerProcess

    other = tiny_model("qwen2")
    with ServerProcess(None, str(folder), str(other), "--max-batch-size", "3") as server:
        entries = httpx.get(f"{server.url}/stats").json()["models"]
        assert [entry["name"] for entry in entries] == [str(folder), str(other)]
        assert [entry["limits"]["max_batch_size"] for entry in entries] == [3, 3]
        assert f"{folder}, {other}" in server.banner
