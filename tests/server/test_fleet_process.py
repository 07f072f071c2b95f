"""Servers of several models that are ended while models load, and the memory that they take, measured from outside."""

import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import pytest

from fleet_server import KEY, FleetServer, text_of, until
from octavo.fleet.memory import SERVER, needs
from octavo.fleet.specs import model_spec


def processes(root: int) -> set[int]:
    """Of a process and all that descend from it."""
    found, rest = set[int](), [root]
    while rest:
        pid = rest.pop()
        found.add(pid)
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                rest += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it has ended meanwhile
            continue
    return found


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("change", ["load", "swap", "on demand"])
def test_a_signal_during_a_change(
    tiny_llama: Path, tmp_path: Path, number: signal.Signals, change: str, many: bool
) -> None:
    """The first one lets requests finish, the second one ends the server at once; no process is left behind."""
    if number is signal.SIGINT and change != "swap" and not many:
        pytest.skip("as with SIGTERM: --many")
    description = {
        "models": {"llama": str(tiny_llama), "late": {"model": str(tiny_llama), "load_on_demand": True}},
    }
    server = FleetServer(tmp_path / "fleet", description)
    with server, ThreadPoolExecutor(1) as thread:
        server.hold_loads()
        work: Callable[[], httpx.Response] = {
            "load": lambda: server.change("load", "new", model=str(tiny_llama)),
            "swap": lambda: server.change("swap", "llama", model=str(tiny_llama)),
            "on demand": lambda: server.complete("late"),
        }[change]
        running = thread.submit(work)
        server.until_loading()
        before = processes(server.process.pid)
        assert len(server.engine_pids()) == 2
        server.signal(number)
        server.wait_until_closed()
        if number is signal.SIGTERM:  # it drains
            server.let_load()
            assert running.result().status_code == 200
        else:
            server.signal(number)
        assert server.process.wait(timeout=30) == 0
        until(lambda: not alive(before))


def test_a_signal_while_a_model_is_downloaded(tiny_llama: Path, tmp_path: Path) -> None:
    """From a hub that does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as hub, ThreadPoolExecutor(1) as thread:
        endpoint = f"http://127.0.0.1:{hub.getsockname()[1]}"
        server = FleetServer(tmp_path, {"models": {"a": str(tiny_llama)}}, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
        with server:
            load = thread.submit(server.change, "load", "b", model="some/model")
            connection, _ = hub.accept()
            with connection:
                server.signal(signal.SIGTERM)
                server.wait_until_closed()
                server.signal(signal.SIGTERM)
                assert server.process.wait(timeout=30) == 0
                assert load.result().status_code == 503


def test_a_signal_while_the_models_load_at_start(tiny_llama: Path, tmp_path: Path) -> None:
    server = FleetServer(tmp_path, {"models": {"a": str(tiny_llama), "b": {"model": str(tiny_llama), "replicas": 2}}})
    server.hold_loads()
    until(lambda: len(server.engine_pids()) == 3)
    server.until_loading()
    before = processes(server.process.pid)
    server.signal(signal.SIGTERM)
    server.process.communicate(timeout=30)
    until(lambda: not alive(before))
    assert "Traceback" not in server.stderr()


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"models": {"a": "{llama}", "b": "absent"}}, "absent"),
        ({"models": {"a": "{llama}", "b": {"model": "{llama}", "kv_cache_memory": "9GiB"}}, "memory": "2GiB"}, "'b'"),
        ({"models": {"a": "{llama}"}, "splits": {"s": {"a": 90}}}, "add up to 90"),
    ],
)
def test_a_fleet_that_cannot_start(tiny_llama: Path, tmp_path: Path, description: Any, message: str) -> None:
    import json

    text = json.dumps(description).replace("{llama}", str(tiny_llama))
    server = FleetServer(tmp_path, json.loads(text))
    assert server.process.wait(timeout=60) == 2
    [line] = server.stderr().splitlines()
    assert message in line and line.startswith("octavo: ")


def test_the_key_is_not_printed(tiny_llama: Path) -> None:
    """Not by octavo config, not in the error for a wrong one, and not to the access log."""
    run = [sys.executable, "-c", "from octavo.cli import main; main()"]
    for arguments in (["config", "--admin-key", KEY], ["config", "--json", "--admin-key", KEY]):
        done = subprocess.run([*run, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "***" in done.stdout and KEY not in done.stdout + done.stderr
    wrong = f"{KEY} with spaces"
    done = subprocess.run([*run, "config", "--admin-key", wrong], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and KEY not in done.stdout + done.stderr
    assert "admin_key must be printable ASCII without spaces" in done.stderr


# Memory


class Meter:
    """Measures the memory of a server and all its processes every 50 ms, for a `with` block.

    The proportional share (PSS) counts pages that processes share once.
    """

    def __init__(self, pid: int):
        self._pid, self._stop = pid, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.peak = self.samples = 0

    def __enter__(self) -> "Meter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, sum(map(self.pss, processes(self._pid))))
            self.samples += 1

    @staticmethod
    def pss(pid: int) -> int:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended meanwhile
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


@pytest.fixture(scope="module")
def wide_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of the same kind whose KV cache takes 64 KiB per token."""
    from transformers import LlamaConfig

    from tiny_models import VOCAB_SIZE, random_model, save_tokenizer

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=32,
        num_key_value_heads=32, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    folders = [tmp_path_factory.mktemp(f"wide-{number}") for number in range(3)]
    for folder in folders:
        random_model(config).bfloat16().save_pretrained(folder)
        save_tokenizer(folder)
    return folders


KV = 384 * 2**20  # so much that three models with full caches would exceed the budget, though it is generous
FILLING = 12  # prompts of 490 tokens that fill a cache


def test_three_models_in_memory_for_two(wide_models: list[Path], tmp_path: Path, many: bool) -> None:
    """Every request for any of them is answered, and the server never takes more than its budget."""
    settings = {"kv_cache_memory": f"{KV >> 20}MiB", "load_on_demand": True}
    models = {f"m{number}": {"model": str(folder), **settings} for number, folder in enumerate(wide_models)}
    size = needs(model_spec("m", models["m0"] | {"load_on_demand": False}).config, wide_models[0]).bytes
    budget = SERVER + 2 * size
    served, states = Counter[str](), set[str]()
    with (
        FleetServer(tmp_path, {"models": models, "memory": budget}) as server,
        Meter(server.process.pid) as meter,
        ThreadPoolExecutor(3) as threads,
    ):
        server.http.timeout = httpx.Timeout(None)

        def client(seed: int) -> None:
            chance = random.Random(seed)
            for turn in range(30 if many else 1):
                name = f"m{(seed + turn) % 3}"
                prompts = [[chance.randrange(3, 500) for _ in range(490)] for _ in range(FILLING)]
                text_of(server.complete(name, prompts, max_tokens=2))
                served[name] += 1

        clients = [threads.submit(client, seed) for seed in range(3)]
        while wait(clients, 0.05).not_done:
            entries = server.models()
            states |= {str(entries[name]["state"]) for name in models}
            assert sum(entries[name]["state"] in ("loaded", "draining") for name in models) <= 2
        for each in clients:
            each.result()
    assert set(served) == set(models) and {"unloaded", "loading", "loaded"} <= states
    assert budget / 2 < meter.peak <= budget, f"{meter.peak >> 20} of {budget >> 20} MiB, {meter.samples} samples"
    print(f"{meter.peak >> 20} of {budget >> 20} MiB, {meter.samples} samples")
