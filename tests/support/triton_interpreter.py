"""Run the tests of a file in Triton's interpreter, which needs no GPU, in a process of their own.

Triton decides when it is imported whether kernels are interpreted, so other tests must not share the process.
"""

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str) -> None:
    """Run the tests of `file` with TRITON_INTERPRET=1. Fails with their output; skips without Triton."""
    pytest.importorskip("triton", reason="Triton is not installed; it comes with octavo[cuda]")
    command = [sys.executable, "-m", "pytest", file, "-q", "--tb=short", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
