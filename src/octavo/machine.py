"""The processors and memory that this process may use: those of the machine, or the container's limits if lower.

Limits come from Linux control groups, version 2 or 1: the group of this process and every group above it.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
VMSTAT = Path("/proc/vmstat")
CPUINFO = Path("/proc/cpuinfo")
STAT = Path("/proc/stat")
PROCESSORS = Path("/sys/devices/system/cpu")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MEMORY_LIMITS = ("memory.max", "memory.high")
_MEMORY_LIMITS_1 = ("memory.limit_in_bytes",)  # of version 1
_UNLIMITED = 2**62  # version 1 writes a number above this where there is no limit


def available_cores(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Return how many threads can compute at the same time: at least 1.

    This is the number of processors in the affinity mask, or the control group's quota of processor time
    (`docker run --cpus`), rounded up, if that is lower.
    """
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), core_quota(cgroups, membership))))


def core_quota(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float:
    """Return the control group's quota of processor time, in processors; infinity if there is none."""
    quotas = [
        *(_quota(folder / "cpu.max") for folder in _groups(cgroups, membership, None)),
        *(
            _quota(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
            for folder in _groups(cgroups, membership, "cpu")
        ),
    ]
    return min(quotas, default=math.inf)


def physical_cores(processors: Path = PROCESSORS) -> int:
    """Return the number of cores that this process may use; hyperthreads of one core count once."""
    allowed = os.sched_getaffinity(0)
    siblings = {_read(processors / f"cpu{number}/topology/thread_siblings_list") or str(number) for number in allowed}
    return len(siblings)


def busy_seconds(stat: Path = STAT) -> dict[str, float]:
    """Return the seconds that each core, such as "cpu0", was busy or lent to other machines since the machine's start.

    Only of cores that this process may use; {} if that is unknown.
    """
    allowed, busy = {f"cpu{number}" for number in os.sched_getaffinity(0)}, {}
    for line in _read(stat).splitlines():
        core, *ticks = line.split()
        if core in allowed:
            user, nice, system, _idle, _waiting, irq, soft_irq, stolen = map(int, ticks[:8])
            busy[core] = (user + nice + system + irq + soft_irq + stolen) / os.sysconf("SC_CLK_TCK")
    return busy


def share_of_cores(number: int, of: int, processors: Path = PROCESSORS) -> set[int]:
    """Return the processors for one of several processes that divide this process's processors among them.

    Processes share processors if there are fewer of these. Those of a NUMA node, and neighbors, stay together.
    """
    cores = sorted(os.sched_getaffinity(0), key=lambda core: (_numa_node(core, processors), core))
    first, end = number * len(cores) // of, (number + 1) * len(cores) // of
    return set(cores[first:end] or [cores[first]])


def _numa_node(core: int, processors: Path) -> int:
    """Return the number of a processor's NUMA node; 0 if unknown."""
    nodes = (processors / f"cpu{core}").glob("node[0-9]*")
    return min((int(node.name.removeprefix("node")) for node in nodes), default=0)


def available_memory(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP, meminfo: Path = MEMINFO) -> int:
    """Return the bytes that can be allocated without swapping and within the group's limit: at least 0.

    Page cache that the kernel can drop counts as available.
    """
    free = [
        *(
            _below_limit(folder, _MEMORY_LIMITS, "memory.current", "inactive_file")
            for folder in _groups(cgroups, membership, None)
        ),
        *(
            _below_limit(folder, _MEMORY_LIMITS_1, "memory.usage_in_bytes", "total_inactive_file")
            for folder in _groups(cgroups, membership, "memory")
        ),
    ]
    return max(0, min([_available_on_machine(meminfo), *(bytes for bytes in free if bytes is not None)]))


def total_memory(meminfo: Path = MEMINFO) -> int:
    """Return the bytes of the machine's memory, whatever the group's limit."""
    kilobytes = _field(meminfo, "MemTotal:")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if kilobytes is None else kilobytes * 1024


def memory_limit(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Return the lowest limit of memory of the control groups, in bytes; None if there is none."""
    limits = [
        *(_limit(folder, _MEMORY_LIMITS) for folder in _groups(cgroups, membership, None)),
        *(_limit(folder, _MEMORY_LIMITS_1) for folder in _groups(cgroups, membership, "memory")),
    ]
    return min((limit for limit in limits if limit is not None and limit < _UNLIMITED), default=None)


def processor_name(cpuinfo: Path = CPUINFO) -> str:
    """Return the name of the first processor; "" if unknown."""
    for line in _read(cpuinfo).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return ""


def huge_pages(enabled: Path = HUGE_PAGES) -> str:
    """Return when the kernel uses transparent huge pages: always, madvise (if asked by a program) or never.

    Returns "" if the kernel does not have them.
    """
    return next((word.strip("[]") for word in _read(enabled).split() if word.startswith("[")), "")


def memory_kills(vmstat: Path = VMSTAT) -> int:
    """Return how many processes the kernel has killed since boot because memory ran out; 0 if unknown."""
    return _field(vmstat, "oom_kill") or 0


def _available_on_machine(meminfo: Path) -> int:
    kilobytes = _field(meminfo, "MemAvailable:")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if kilobytes is None else kilobytes * 1024


def _groups(cgroups: Path, membership: Path, controller: str | None) -> Iterator[Path]:
    """Yield the folder of this process's group and those above it, for a controller of version 1 or (None) version 2.

    In a container, the kernel may name groups by their path on the host, which does not exist in the container. In that
    case, the root of the hierarchy is the container's own group.
    """
    mounts = [cgroups / controller] if controller else [cgroups, cgroups / "unified"]
    path = _path_of_group(membership, controller)
    for mount in mounts:
        folder = mount / path
        if ".." in folder.parts or not folder.is_dir():
            folder = mount
        yield folder
        while folder != mount:
            folder = folder.parent
            yield folder


def _path_of_group(membership: Path, controller: str | None) -> str:
    """Return the group's path below its mount, from lines such as `4:memory:/docker/7a1` or, for version 2, `0::/`."""
    for line in _read(membership).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if (controller in controllers.split(",")) if controller else controllers == "":
            return path.strip("/")
    return ""


def _quota(file: Path, period_file: Path | None = None) -> float:
    """Return the processors that a quota allows; infinity if there is none.

    `file` holds both the quota and the period (version 2: "50000 100000"), or the quota alone, beside `period_file`.
    """
    words = _read(file).split() + (_read(period_file).split() if period_file else [])
    try:
        quota, period = int(words[0]), int(words[1])
    except (IndexError, ValueError):  # no such file, or "max"
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def _below_limit(folder: Path, limits: tuple[str, ...], usage: str, droppable: str) -> int | None:
    """Return the bytes that a group may still allocate; None if it has no limit."""
    limit = _limit(folder, limits)
    used = _read(folder / usage).strip()
    if limit is None or not used.isdecimal():
        return None
    return limit - int(used) + (_field(folder / "memory.stat", droppable) or 0)


def _limit(folder: Path, names: tuple[str, ...]) -> int | None:
    """Return the lowest number in a group's files of these names; None if none of them has a number."""
    return min((int(text) for name in names if (text := _read(folder / name).strip()).isdecimal()), default=None)


def _field(file: Path, name: str) -> int | None:
    """Return the number after `name` in a file of `name number` lines."""
    for line in _read(file).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None


def _read(file: Path) -> str:
    """Return the text of a small kernel file; "" if it cannot be read."""
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
