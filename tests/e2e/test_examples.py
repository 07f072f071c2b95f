"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

from server_process import ServerProcess

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


def test_quick_start() -> None:
    assert "TCP" in run("quick_start.py")


def test_micro_batching() -> None:
    assert len(run("micro_batching.py", "3").split()) > 5  # an answer may well be empty, but not all


def test_temperatures() -> None:
    # The answers at temperature 1 may be anything; the last one is greedy.
    assert run("temperatures.py").splitlines()[-1] == "The capital of France is Paris."


def test_kv_state() -> None:
    assert run("kv_state.py").splitlines()[-1] == "Of 87 prompt tokens, 79 were not computed again."


def test_premium_first() -> None:
    served = run("premium_first.py").splitlines()
    assert sorted(served) == [f"{tenant} is served" for tenant in ("acme", "trial 1", "trial 2", "trial 3")]
    assert served.index("acme is served") < 2  # it came last, when the first was perhaps running


def test_openai_client() -> None:
    with ServerProcess("smollm2") as server:
        printed = run("openai_client.py", f"{server.url}/v1")
    assert "Paris" in printed.splitlines()[0]
    assert len(printed.splitlines()) > 1


def test_memory_store() -> None:
    assert run("memory_store.py").splitlines() == [
        "engine A found 0 of 181 tokens",
        "engine B found 160 of 181 tokens",
    ]
