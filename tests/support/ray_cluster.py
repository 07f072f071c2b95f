"""A Ray cluster of several nodes, each on a machine of its own (machines.py)."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from namespaces import missing

from machines import Machines, machines

__all__ = ["RayCluster", "missing", "ray_cluster"]

OBJECTS = 150_000_000  # bytes of a node's object store
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True)
class RayCluster:
    """Nodes 0 (the head) to the last one."""

    machines: Machines
    folder: Path

    def ip(self, node: int) -> str:
        return self.machines.ip(node)

    def popen(self, script: str, *words: str) -> subprocess.Popen[str]:
        """Start a Python script on the head, as a user of the cluster, with pipes to it and from it."""
        command = self.machines.command(0, sys.executable, "-c", script, *words)
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
        command = self.machines.command(node, *RAY, "start", *words, "--disable-usage-stats")
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def kill(self, node: int) -> None:
        """End all processes of a node at once, as a power cut would."""
        self.machines.kill(node)

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
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        machines(len(cpus)) as nodes,
    ):
        cluster = RayCluster(nodes, Path(folder))
        for node, count in enumerate(cpus):  # two at once would take the same names for their sockets
            cluster.start(node, count)
        yield cluster
