"""The server as a process: signals while it loads, standard streams that cannot be written."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

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
