"""Runs tests of Triton kernels in Triton's interpreter, which must be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "kernels" / "interpreted"


def run_interpreted(name: str, seconds: float = 240) -> None:
    """Run the tests of kernels/interpreted/NAME in a process with TRITON_INTERPRET=1. Raises AssertionError."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-x", "--tb=short"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(FOLDER / name)], env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
