"""Machines: network namespaces on a bridge, each with an address of its own. Nothing listens outside of them."""

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from namespaces import ip


@dataclass(frozen=True)
class Machines:
    """Machines 0 to the last one, by the names of their namespaces, and the namespace of the bridge."""

    names: list[str]
    hub: str

    def ip(self, machine: int) -> str:
        return f"10.77.0.{machine + 1}"

    def command(self, machine: int, *words: str) -> list[str]:
        """A command that runs on a machine."""
        return ["ip", "netns", "exec", self.names[machine], *words]

    def cut(self, machine: int) -> None:
        """Lose all that a machine sends and receives from now on."""
        ip("-n", self.hub, "link", "set", f"port{machine}", "down")

    def join(self, machine: int) -> None:
        """Undo `cut`."""
        ip("-n", self.hub, "link", "set", f"port{machine}", "up")

    def kill(self, machine: int) -> None:
        """End all processes of a machine at once, as a power cut would."""
        for _ in range(10):  # a process may start another meanwhile
            pids = self._pids(machine)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            if not pids:
                return
            time.sleep(0.05)

    def runs(self, machine: int, program: bytes) -> bool:
        """Whether a machine has a process with this in its command line."""
        for pid in self._pids(machine):
            with contextlib.suppress(OSError):
                if program in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
        return False

    def _pids(self, machine: int) -> list[int]:
        command = ["ip", "netns", "pids", self.names[machine]]
        return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True).stdout.split()]


@contextlib.contextmanager
def machines(count: int) -> Iterator[Machines]:
    """So many machines, whose processes are killed at the end."""
    tag = uuid.uuid4().hex[:6]
    made = Machines([f"octavo-{tag}-{machine}" for machine in range(count)], f"octavo-{tag}-hub")
    with contextlib.ExitStack() as stack:
        for name in (made.hub, *made.names):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", made.hub, "link", "add", "br0", "type", "bridge")
        ip("-n", made.hub, "link", "set", "br0", "up")
        for machine, name in enumerate(made.names):
            port = f"port{machine}"
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", made.hub)
            ip("-n", made.hub, "link", "set", port, "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{made.ip(machine)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            stack.callback(made.kill, machine)
        yield made
