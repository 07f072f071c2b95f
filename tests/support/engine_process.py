"""`octavo engine` in a process of its own, on a port of 127.0.0.1 that was free."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

from server_process import free_port

COMMAND = [sys.executable, "-c", "from octavo.entrypoints.command import main; main()"]


class RemoteEngine:
    """An engine for a `with` block, at the end of which it must end by itself and have printed no traceback.

    Args:
        url: where it listens; by default, at a free port.
        flags: of octavo engine. Keywords are variables of its environment.
    """

    def __init__(self, model: Path, *flags: str, url: str | None = None, **environment: str):
        self.url = url or f"tcp://127.0.0.1:{free_port()}"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with this object)
        command = [*COMMAND, "engine", str(model), "--listen", self.url, "--served-model-name", "tiny"]
        self.process = subprocess.Popen(
            [*command, "--threads", "1", *flags],
            stdout=subprocess.PIPE, stderr=self._errors, text=True, env=os.environ | environment,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def until_ready(self) -> Self:
        assert self.process.stdout is not None
        if not any("Ctrl-C" in line for line in self.process.stdout):
            raise AssertionError(f"the engine did not start: {self.stderr()}")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        if kind is None:
            assert code in (0, -signal.SIGKILL), self.stderr()
            assert "Traceback" not in self.stderr(), self.stderr()

    def stderr(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def child(self) -> int:
        """The process that computes."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            if children := (task / "children").read_text().split():
                return int(children[0])
        raise AssertionError("there is no engine process")
