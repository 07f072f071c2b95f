"""A real control group of Linux, version 1 or 2, with limits, for a process to join."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from octavo.machine import CGROUPS

JOIN = """
import os, pathlib, sys
for group in os.environ["GROUPS"].split(":"):
    pathlib.Path(group, "cgroup.procs").write_text(str(os.getpid()))
"""


@contextlib.contextmanager
def control_group(processors: float, memory: int) -> Generator[dict[str, str]]:
    """Make a group for a `with` block; yields the environment with which a process that runs JOIN joins it.

    The test is skipped where groups cannot be made.
    """
    version_2 = (CGROUPS / "cgroup.controllers").exists()
    cpu, ram = (CGROUPS if version_2 else CGROUPS / kind for kind in ("cpu", "memory"))
    groups = {parent / f"octavo-test-{os.getpid()}" for parent in (cpu, ram)}
    quota = str(int(100_000 * processors))
    limits = {"cpu.max": f"{quota} 100000", "memory.max": str(memory)} if version_2 else {
        "cpu.cfs_quota_us": quota, "memory.limit_in_bytes": str(memory)
    }  # fmt: skip
    made: list[Path] = []
    try:
        try:
            for group in groups:
                group.mkdir()
                made.append(group)
            for name, limit in limits.items():
                [file] = [group / name for group in groups if (group / name).exists()]
                file.write_text(limit)
        except (OSError, ValueError) as error:
            pytest.skip(f"control groups cannot be made here: {error}")
        yield {"GROUPS": ":".join(map(str, groups))}
    finally:
        for group in made:
            group.rmdir()
