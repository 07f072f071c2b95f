"""Devices: how busy the machine's GPUs are, or its processor cores if it has none."""

from contextlib import suppress
from threading import Lock
from typing import Any

from octavo.machine import busy_seconds

from .window import Window


class Devices:
    """Measures the utilization of each device, by all processes of the machine. For any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._nvml = _nvml()
        self._windows = {core: Window(busy) for core, busy in busy_seconds().items()}

    def utilization(self) -> dict[str, float]:
        """Return the utilization of each device in percent, by name: "gpu0", or "cpu0" for a core.

        Cores that this process may not use are left out, and GPUs that do not tell, such as those that are divided
        (MIG). Read from the NVIDIA driver, or from /proc/stat, where a core is averaged over the seconds since an
        earlier call.
        """
        if self._nvml is not None:
            return _gpus(self._nvml)
        with self._lock:
            busy, windows = busy_seconds(), self._windows.items()
            return {core: min(100.0 * window.rate(busy[core]), 100.0) for core, window in windows if core in busy}


def _nvml() -> Any:
    """Return the module of NVIDIA's management library, or None without it or without a GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver
        return None
    return pynvml if pynvml.nvmlDeviceGetCount() else None


def _gpus(nvml: Any) -> dict[str, float]:
    percent = {}
    for number in range(nvml.nvmlDeviceGetCount()):
        with suppress(nvml.NVMLError):
            device = nvml.nvmlDeviceGetHandleByIndex(number)
            percent[f"gpu{number}"] = float(nvml.nvmlDeviceGetUtilizationRates(device).gpu)
    return percent
