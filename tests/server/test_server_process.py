"""The server as a process: signals and failures while it loads, its folders, streams that cannot be written."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from server_process import COMPLETIONS, ServerProcess

SERVE = ["-m", "octavo.entrypoints.openai.api_server", "--model"]
IN_NEW_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child"]  # its child is PID 1 there


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_child(process: "subprocess.Popen[bytes]", pid: int) -> int:
    deadline = time.monotonic() + 60
    while not (found := children(pid)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    return found[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_loading_ends_the_server_and_its_engine(tiny_llama: Path, number: signal.Signals) -> None:
    command = [sys.executable, *SERVE, str(tiny_llama), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    engine = wait_for_child(process, process.pid)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert b"Traceback" not in stderr
    deadline = time.monotonic() + 30
    while Path(f"/proc/{engine}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{engine}").exists()


def test_sigterm_ends_it_while_loading_as_pid_1(tiny_llama: Path) -> None:
    if subprocess.run([*IN_NEW_NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("this needs the right to make PID namespaces")
    command = [*IN_NEW_NAMESPACE, sys.executable, *SERVE, str(tiny_llama), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        server = wait_for_child(process, process.pid)
        wait_for_child(process, server)
        subprocess.run(["kill", "-TERM", str(server)], check=True)
        process.communicate(timeout=30)


def test_an_engine_that_fails_to_load_says_why(tiny_llama: Path, tmp_path: Path) -> None:
    """For a reason that nobody foresaw: here, what Python runs first in every process breaks the loader."""
    lines = [
        "import octavo.engine.loading as loading",
        "def load(*_, **__): raise KeyError('odd')",
        "loading.load_engine = load",
    ]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    command = [sys.executable, *SERVE, str(tiny_llama), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "KeyError: 'odd'" in done.stderr.splitlines()[-1] and "Fatal" not in done.stderr, done.stderr


@pytest.mark.parametrize("folder", ["t" * 100, "none"])
def test_temporary_folders_of_any_length(tiny_llama: Path, tmp_path: Path, folder: str) -> None:
    if folder != "none":
        (tmp_path / folder).mkdir()
    with ServerProcess(tiny_llama, TMPDIR=str(tmp_path / folder)) as server:
        body = {"prompt": "x", "max_tokens": 2, "ignore_eos": True}
        assert httpx.post(server.url + COMPLETIONS, json=body, timeout=60).status_code == 200


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_it_serves_without_a_standard_output(tiny_llama: Path, redirection: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, *SERVE, str(tiny_llama), "--port", str(port)]
    process = subprocess.Popen(["sh", "-c", f'exec "$@" {redirection}', "sh", *command], stderr=subprocess.PIPE)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=30)) as client:
        body = {"prompt": "x", "max_tokens": 2, "ignore_eos": True}
        for _ in range(2):  # the access log of the first has been written by the end of the second
            assert client.post("/v1/completions", json=body, timeout=60).status_code == 200
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0 and b"Traceback" not in stderr, stderr
