"""Programs of other projects: found where they are installed, and run for a `with` block."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from server_process import free_port, wait_for_port


def program(name: str) -> str:
    """Return the path of a program; the test is skipped where it is not installed."""
    folders = f"{Path(sys.executable).parent}:/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/bin:/bin"
    found = shutil.which(name, path=folders)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@contextlib.contextmanager
def running(command: list[str], port: int, **options: Any) -> Generator[None]:
    """Run a server for a `with` block, which begins when it listens on the port. The options are Popen's."""
    process = subprocess.Popen(command, **options)
    try:
        wait_for_port(port)
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextlib.contextmanager
def prometheus(config: Path) -> Generator[str]:
    """Run Prometheus with this configuration; yields its address. Its data is written beside the configuration."""
    port = free_port()
    command = [
        program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={config.parent / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    with running(command, port):
        yield f"http://127.0.0.1:{port}"
