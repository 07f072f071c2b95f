"""Processors and memory under the limits of control groups: made-up trees of both versions, and a real group."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from control_group import JOIN, control_group
from octavo.machine import (
    available_cores,
    available_memory,
    busy_seconds,
    core_quota,
    huge_pages,
    memory_limit,
    physical_cores,
    processor_name,
    total_memory,
)

CORES = len(os.sched_getaffinity(0))
GIB = 2**30


def tree(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path, Path]:
    """Write a tree of control groups, /proc/self/cgroup and /proc/meminfo (8 GiB available); return their paths."""
    groups = root / "cgroup"
    for name, content in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(content + "\n")
    (root / "membership").write_text(membership)
    (root / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    return groups, root / "membership", root / "meminfo"


@pytest.mark.parametrize(
    "membership, files, cores",
    [
        ("0::/\n", {"cpu.max": "100000 100000"}, 1),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),  # rounded up
        ("0::/\n", {"cpu.max": "1000 100000"}, 1),  # at least one
        ("0::/\n", {"cpu.max": "max 100000"}, math.inf),
        ("0::/\n", {"cpu.max": "6400000 100000"}, math.inf),  # never more than the affinity mask
        ("0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),  # of a group above
        ("0::/on/the/host\n", {"cpu.max": "100000 100000"}, 1),  # a path that does not exist in the container
        ("0::/../../x\n", {"cpu.max": "100000 100000"}, 1),
        ("4:cpu,cpuacct:/d\n", {"cpu/d/cpu.cfs_quota_us": "100000", "cpu/d/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/d\n", {"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, math.inf),
        ("4:cpu:/d\n0::/\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("0::/u\n", {"unified/u/cpu.max": "100000 100000"}, 1),  # version 2 beside version 1
        ("nonsense\n\n::\n", {"cpu.max": "a b c"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_cores(membership: str, files: dict[str, str], cores: float, tmp_path: Path) -> None:
    groups, member, _ = tree(tmp_path, membership, files)
    assert available_cores(groups, member) == min(CORES, cores)


@pytest.mark.parametrize(
    "membership, files, memory",
    [
        ("0::/\n", {"memory.max": str(2 * GIB), "memory.current": str(GIB)}, GIB),
        ("0::/\n", {"memory.max": "max", "memory.current": str(GIB)}, 8 * GIB),
        ("0::/\n", {"memory.max": "max", "memory.high": str(2 * GIB), "memory.current": "0"}, 2 * GIB),
        ("0::/\n", {"memory.max": str(99 * GIB), "memory.current": "0"}, 8 * GIB),  # never more than the machine has
        ("0::/\n", {"memory.max": str(GIB), "memory.current": str(2 * GIB)}, 0),
        ("0::/\n", {"memory.max": str(GIB), "memory.current": str(GIB), "memory.stat": "inactive_file 4096"}, 4096),
        ("0::/a/b\n", {"a/memory.max": str(GIB), "a/memory.current": "0", "a/b/memory.max": "max"}, GIB),
        ("9:memory:/d\n", {"memory/d/memory.limit_in_bytes": str(GIB), "memory/d/memory.usage_in_bytes": "0"}, GIB),
        ("9:memory:/d\n", {"memory/memory.limit_in_bytes": str(GIB), "memory/memory.usage_in_bytes": "0"}, GIB),
        ("9:memory:/\n", {"memory/memory.limit_in_bytes": str(2**63), "memory/memory.usage_in_bytes": "0"}, 8 * GIB),
        ("", {}, 8 * GIB),
    ],
)  # fmt: skip
def test_memory(membership: str, files: dict[str, str], memory: int, tmp_path: Path) -> None:
    assert available_memory(*tree(tmp_path, membership, files)) == memory


def test_limits_and_totals(tmp_path: Path) -> None:
    files = {"a/cpu.max": "150000 100000", "a/memory.max": str(3 * GIB), "memory.max": str(4 * GIB)}
    groups, membership, meminfo = tree(tmp_path, "0::/a\n", files)
    assert core_quota(groups, membership) == 1.5
    assert memory_limit(groups, membership) == 3 * GIB
    assert total_memory(meminfo) == 99999999 * 1024
    none, membership, _ = tree(tmp_path / "1", "9:memory:/\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096)})
    assert memory_limit(none, membership) is None  # version 1 writes this number for "no limit"
    assert core_quota(none, membership) == math.inf


def test_hyperthreads_count_as_one_core(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert physical_cores(tmp_path) == CORES  # nothing is known
    for number in allowed:
        (tmp_path / f"cpu{number}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{number}" / "topology" / "thread_siblings_list").write_text(f"{allowed[0]}-{allowed[-1]}\n")
    assert physical_cores(tmp_path) == 1


@pytest.mark.parametrize(("text", "mode"), [("always [madvise] never\n", "madvise"), ("", "")])
def test_huge_pages_and_the_processor_s_name(text: str, mode: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    assert huge_pages(file) == mode
    file.write_text("processor\t: 0\nmodel name\t: Abacus 9: deluxe\nmodel name\t: other\n")
    assert processor_name(file) == "Abacus 9: deluxe"
    assert processor_name(tmp_path / "none") == ""


def test_without_proc_the_machine_s_memory_is_assumed(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path / "none", tmp_path / "none") > 0


def test_a_real_group_limits_the_engine_s_threads_and_memory() -> None:
    script = (
        f"{JOIN}\nfrom octavo.machine import available_memory; from octavo import EngineConfig\n"
        "print(EngineConfig().num_threads, available_memory())\n"
    )
    with control_group(processors=1, memory=GIB) as environment:
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True, text=True, timeout=60, check=True, env=os.environ | environment,
        )  # fmt: skip
    threads, free = map(int, done.stdout.split())
    assert threads == 1
    assert 0 < free <= GIB


def test_seconds_that_cores_were_busy(tmp_path: Path) -> None:
    core, tick = min(os.sched_getaffinity(0)), os.sysconf("SC_CLK_TCK")
    counts = [tick * 10**number for number in range(10)]  # user, nice, system, idle, waiting, 2 × interrupts, stolen, …
    line = " ".join(map(str, counts))
    (tmp_path / "stat").write_text(
        f"cpu  {line}\ncpu{core} {line}\ncpu{max(os.sched_getaffinity(0)) + 1} {line}\nbtime 1\n"
    )
    assert busy_seconds(tmp_path / "stat") == {f"cpu{core}": 11_100_111.0}
    assert busy_seconds(tmp_path / "nothing") == {}
