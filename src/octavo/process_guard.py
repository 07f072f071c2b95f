"""Keep the memory of a process that holds secrets from core dumps, other users and swap; let it end with its parent."""

import ctypes
import os
import resource
import signal
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK = 14


def hide_memory() -> None:
    """Forbid core dumps of this process, and debuggers and /proc/PID/environ and mem to all users but root."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that has started it ends, even if it is suspended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def lock_memory() -> str | None:
    """Keep all memory of this process from being swapped to disk. Return the reason if that is impossible.

    Memory is locked when it is first touched. Where the process may lock only some memory, nothing is locked: beyond
    the limit, allocations would fail. Locked memory of a mapped file cannot be freed (MADV_DONTNEED).
    """
    if (reason := lock_obstacle()) is not None:
        return reason
    if ctypes.CDLL(None, use_errno=True).mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        return os.strerror(ctypes.get_errno())
    return None


def lock_obstacle() -> str | None:
    """Return why this process may not lock its memory; None if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY and soft != hard:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    if hard == resource.RLIM_INFINITY or _has_capability(_CAP_IPC_LOCK):
        return None
    return f"the limit is {soft >> 10:,} KiB: raise it (LimitMEMLOCK=infinity, ulimit -l unlimited), or turn swap off"


def _has_capability(number: int) -> bool:
    try:
        status = Path("/proc/self/status").read_text()
        [effective] = [line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")]
    except (OSError, ValueError):
        return False
    return bool(int(effective, 16) >> number & 1)
