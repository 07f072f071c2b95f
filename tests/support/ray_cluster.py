"""A Ray cluster of several nodes, each in a network namespace of its own. Nothing listens outside of them."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OBJECTS = 150_000_000  # bytes of a node's object store
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def missing() -> str | None:
    """Why this machine cannot have such a cluster; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"octavo-try-{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    except OSError:
        return "there is no command ip (package iproute2)"
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@dataclass(frozen=True)
class RayCluster:
    """Nodes 0 (the head) to the last one."""

    names: list[str]
    folder: Path

    def ip(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def command(self, node: int, *words: str) -> list[str]:
        """A command that runs on a node."""
        return ["ip", "netns", "exec", self.names[node], *words]

    def popen(self, script: str, *words: str) -> subprocess.Popen[str]:
        """Start a Python script on the head, as a user of the cluster, with pipes to it and from it."""
        command = self.command(0, sys.executable, "-c", script, *words)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(command, env=self._environment(), text=True, **pipes)

    def start(self, node: int, cpus: int) -> None:
        where = [
            "--head",
            "--port=6379",
            "--include-dashboard=false",
            f"--temp-dir={self.folder}",
            '--resources={"head": 1}',
        ]
        words = where if node == 0 else [f"--address={self.ip(0)}:6379"]
        words += [f"--node-ip-address={self.ip(node)}", f"--num-cpus={cpus}", f"--object-store-memory={OBJECTS}"]
        command = self.command(node, *RAY, "start", *words, "--disable-usage-stats")
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def kill(self, node: int) -> None:
        """End all processes of a node at once, as a power cut would."""
        for _ in range(10):  # a process may start another meanwhile
            listed = subprocess.run(["ip", "netns", "pids", self.names[node]], capture_output=True, text=True).stdout
            for pid in map(int, listed.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            if not listed:
                return
            time.sleep(0.05)

    def _environment(self) -> dict[str, str]:
        own = {
            "RAY_ADDRESS": f"{self.ip(0)}:6379",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "100",
            "RAY_health_check_period_ms": "1000",
        }
        return os.environ | own


@contextlib.contextmanager
def ray_cluster(cpus: list[int]) -> Iterator[RayCluster]:
    """Start a cluster with a node of so many CPUs each."""
    tag = uuid.uuid4().hex[:6]
    hub = f"ray-{tag}-hub"
    names = [f"ray-{tag}-{node}" for node in range(len(cpus))]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        cluster = RayCluster(names, Path(folder))
        for name in (hub, *names):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", hub, "link", "add", "br0", "type", "bridge")
        ip("-n", hub, "link", "set", "br0", "up")
        for node, name in enumerate(names):
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{node}", "netns", hub)
            ip("-n", hub, "link", "set", f"port{node}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{cluster.ip(node)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        for node in range(len(cpus)):
            stack.callback(cluster.kill, node)
        for node, count in enumerate(cpus):  # two at once would take the same names for their sockets
            cluster.start(node, count)
        yield cluster
