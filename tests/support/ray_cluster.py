"""A Ray cluster of several nodes, each in a network namespace of its own. Nothing listens outside of them."""

import contextlib
import os
import subprocess
import sys
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

    def run(self, script: str, *words: str, timeout: float = 120) -> str:
        """Run a Python script on the head, as a user of the cluster. Returns what it prints."""
        done = subprocess.run(
            self.command(0, sys.executable, "-c", script, *words),
            env=self._environment(), capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

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
        pids = subprocess.run(["ip", "netns", "pids", self.names[node]], capture_output=True, text=True).stdout.split()
        for pid in map(int, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    def _environment(self) -> dict[str, str]:
        own = {"RAY_ADDRESS": f"{self.ip(0)}:6379", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
        return os.environ | own


@contextlib.contextmanager
def ray_cluster(folder: Path, cpus: list[int]) -> Iterator[RayCluster]:
    """Start a cluster with a node of so many CPUs each."""
    tag = uuid.uuid4().hex[:6]
    hub = f"ray-{tag}-hub"
    cluster = RayCluster([f"ray-{tag}-{node}" for node in range(len(cpus))], folder)

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    with contextlib.ExitStack() as stack:
        for name in (hub, *cluster.names):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", hub, "link", "add", "br0", "type", "bridge")
        ip("-n", hub, "link", "set", "br0", "up")
        for node, name in enumerate(cluster.names):
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{node}", "netns", hub)
            ip("-n", hub, "link", "set", f"port{node}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{cluster.ip(node)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        for node, count in enumerate(cpus):
            stack.callback(cluster.kill, node)
            cluster.start(node, count)
        yield cluster
