"""The short form of benchmarks/chaos.py: no request is lost, no token wrong, while engines are killed and suspended."""

import subprocess
import sys
from pathlib import Path

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


def test_kills_and_suspensions_under_streaming_clients(tiny_llama: Path) -> None:
    sizes = ("--clients", "12", "--seconds", "15", "--kills", "3", "--suspensions", "1", "--max-tokens", "100")
    command = [sys.executable, CHAOS, "--model", tiny_llama, *sizes]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost: 0, wrong: 0" in done.stdout
    assert done.stderr.count("the engine ended unexpectedly") >= 4
