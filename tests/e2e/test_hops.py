"""The short form of benchmarks/hops.py: no request is lost, no token wrong, while engines and lines fail."""

import subprocess
import sys
from pathlib import Path

import pytest
from network_lines import missing

HOPS = Path(__file__).parents[2] / "benchmarks" / "hops.py"


def test_engines_and_lines_that_fail_under_streams(tiny_llama: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    sizes = ("--engines", "3", "--streams", "12", "--disturbances", "4")
    command = [sys.executable, HOPS, "--model", tiny_llama, *sizes]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost: 0, wrong: 0" in done.stdout
