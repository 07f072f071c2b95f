"""Checks of the host or container: processors, memory and limits."""

import importlib.util
import math
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

from octavo.config import EngineConfig
from octavo.engine.engine_plan import size
from octavo.errors import ConfigError
from octavo.fleet.memory import ENGINE, LEAST_KV, SERVER
from octavo.machine import (
    available_cores,
    available_memory,
    core_quota,
    huge_pages,
    memory_limit,
    physical_cores,
    processor_name,
    total_memory,
)
from octavo.server.config import ServerConfig
from octavo.server.run import OTHER_FILES

from .finding import Finding, change, ok, stop

NVIDIA = Path("/proc/driver/nvidia/gpus")


def check_host(config: EngineConfig, server: ServerConfig) -> Iterator[Finding]:
    """Yield the findings about the host, for a server with these settings."""
    yield _machine()
    yield _instruction_set()
    yield _cores(config)
    yield _memory()
    yield _huge_pages()
    yield _limits(server)
    yield _gpu(config)


def _machine() -> Finding:
    name = processor_name() or platform.processor() or "processor unknown"
    found = f"{platform.machine()} ({name}), {platform.system()} {platform.release()}"
    return ok("machine", found) if platform.system() == "Linux" else stop("machine", f"{found}: Octavo needs Linux")


def _instruction_set() -> Finding:
    try:
        from octavo.backends.cpu import available_isas
        from octavo.backends.cpu.program import choose_isa
    except ImportError as error:
        return stop("kernels", f"the native module cannot be loaded ({error}): reinstall octavo on this machine")
    try:
        best, chosen = available_isas()[0], choose_isa()
    except ConfigError as error:
        return stop("kernels", f"{error}; unset OCTAVO_ISA to use the best ones")
    if chosen != best:
        return change("kernels", f"{chosen}, since OCTAVO_ISA says so; unset it to use {best}")
    if best == "portable" and platform.machine() == "x86_64":
        return change(
            "kernels",
            "portable, which are slow: the processor has no AVX2, or the virtual machine hides it; "
            "pass the host's processor through to the virtual machine, or use another machine",
        )
    return ok("kernels", f"{best}, the best that this processor can run")


def _cores(config: EngineConfig) -> Finding:
    machine, affinity, quota = os.cpu_count() or 1, len(os.sched_getaffinity(0)), core_quota()
    usable, physical = available_cores(), physical_cores()
    found = f"{usable} of {machine} processors" if usable < machine else f"{machine} processors"
    if quota < affinity:
        found += f" (the control group allows {quota:g})"
    ranks = config.ranks_here
    if (threads := config.num_threads * ranks) > usable:
        text = f"{found}, for {threads} threads, which would wait for each other"
        advice = f"--threads to {usable // ranks} or less" if usable >= ranks else "a smaller --tensor-parallel-size"
        return change("cores", f"{text}: set {advice}")
    if quota < affinity and quota != math.floor(quota):
        return change(
            "cores",
            f"{found}: the threads are suspended in turns; set a whole number (docker run --cpus, CPUQuota=)",
        )
    if config.threads is None and physical < usable:
        return change(
            "cores",
            f"{found}, hyperthreads of {physical} cores: --threads {physical} may be faster, which "
            f"octavo bench throughput --threads {physical} shows",
        )
    return ok("cores", f"{found}; {threads} compute threads")


def _memory() -> Finding:
    free, limit, total = available_memory(), memory_limit(), total_memory()
    found = f"{size(free)} free of {size(total)}"
    if limit is not None and limit < total:
        found = f"{size(free)} free of the {size(limit)} that the control group allows (the machine has {size(total)})"
    least = SERVER + ENGINE["cpu"] + LEAST_KV
    if free < least:
        text = f"{found}; a server needs {size(least)} and the weights: free some, or raise the container's limit"
        return stop("memory", text)
    return ok("memory", found)


def _huge_pages() -> Finding:
    mode = huge_pages()
    if mode in ("always", "madvise"):
        return ok("huge pages", f"{mode}: weights and KV cache use them")
    what = "the kernel is set never to use them" if mode else "the kernel has none"
    advice = ": as root, echo madvise > /sys/kernel/mm/transparent_hugepage/enabled" if mode else ""
    return change("huge pages", f"{what}, which makes reading the weights slower{advice}")


def _limits(server: ServerConfig) -> Finding:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    memory = (
        f"locked memory {'unlimited' if locked == resource.RLIM_INFINITY else size(locked)} (used for encrypted models)"
    )
    wanted = server.max_connections + OTHER_FILES
    if files != resource.RLIM_INFINITY and files < wanted:
        return change(
            "limits",
            f"{files:,} open files, which allow {max(files - OTHER_FILES, 1):,} connections: raise the hard limit to "
            f"{wanted:,} (ulimit -Hn, LimitNOFILE=, docker run --ulimit nofile={wanted}), or lower --max-connections; "
            f"{memory}",
        )
    return ok("limits", f"open files suffice for {server.max_connections:,} connections; {memory}")


def _gpu(config: EngineConfig) -> Finding:
    names = _gpu_names()
    wanted = config.device.startswith("cuda")
    if not names:
        if wanted:
            return stop(
                "GPU", f"none found, and the device is {config.device}: install the driver, or use --device cpu"
            )
        return ok("GPU", "none; the model runs on the processor")
    found = ", ".join(names)
    if wanted and importlib.util.find_spec("torch") is None:
        return stop("GPU", f"{found}, but PyTorch is not installed: pip install 'octavo[{config.backend_name}]'")
    if wanted and len(names) < config.tensor_parallel_size:
        needed = config.tensor_parallel_size
        return stop("GPU", f"{found}: tensor_parallel_size {needed} needs {needed} GPUs, use at most {len(names)}")
    used = f"used by the {config.backend_name} backend"
    return ok("GPU", f"{found}: {used if wanted else 'not used; --device cuda uses it'}")


def _gpu_names(folder: Path = NVIDIA) -> list[str]:
    """Return the names of the NVIDIA GPUs that the driver knows."""
    files = sorted(folder.glob("*/information")) if folder.is_dir() else []
    models = [line for file in files for line in file.read_text().splitlines() if line.startswith("Model:")]
    return [line.partition(":")[2].strip() for line in models]
