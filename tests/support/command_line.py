"""The command line as a user runs it: a process of its own, or a command in a terminal."""

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OCTAVO = [sys.executable, "-c", "from octavo.cli import main; main()"]
GREEDY = ("--temperature", "0", "--max-tokens", "16")


def octavo(*arguments: str | Path, stdin: str | bytes = "", **environment: str) -> subprocess.CompletedProcess[str]:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [*OCTAVO, *map(str, arguments)], input=data, capture_output=True, timeout=120, env=os.environ | environment
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def answer(*arguments: str | Path, **options: Any) -> str:
    """The stdout of a command that succeeds and has nothing to say on stderr."""
    done = octavo(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def complaint(*arguments: str | Path, **options: Any) -> str:
    """The one line on stderr of a command that the user has to put right."""
    done = octavo(*arguments, **options)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert re.fullmatch(r"octavo: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


class Terminal:
    """A command in a terminal of its own: what is typed goes in, what it shows comes out."""

    def __init__(self, *arguments: str) -> None:
        self.screen, self.end = os.openpty()
        self.shown = b""
        self.process = subprocess.Popen(
            [*OCTAVO, *arguments], env=os.environ | {"TERM": "xterm"}, preexec_fn=lambda: os.login_tty(self.end)
        )
        os.close(self.end)

    def type(self, keys: str) -> None:
        self.shown = b""
        os.write(self.screen, keys.encode())

    def wait_for(self, pattern: str) -> None:
        assert self.shows(pattern, seconds=60), f"no {pattern} in {self.shown!r}"

    def press_until(self, key: str, pattern: str) -> None:
        """As people do: Python's readline misses a Ctrl-C that comes just before it listens."""
        for _ in range(20):
            self.type(key)
            if self.shows(pattern, seconds=2):
                return
        raise AssertionError(f"no {pattern} in {self.shown!r}")

    def close(self) -> None:
        self.process.kill()
        os.close(self.screen)

    def shows(self, pattern: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not re.search(pattern.encode(), self.shown):
            ready, _, _ = select.select([self.screen], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                return False
            self.shown += os.read(self.screen, 4096)
        return True
