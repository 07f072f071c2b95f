"""Utilization of devices: GPUs as NVIDIA's library tells, on a machine without one by a stand-in, and cores."""

import os
import sys
from types import SimpleNamespace

import pytest

from octavo.server.metrics.devices import Devices


class NVMLError(Exception):
    """Raised by NVIDIA's library, for example NVMLError_NotSupported."""


class Library:
    """The part of pynvml that is used. Of its GPUs, the numbers in `divided` (MIG) have no utilization."""

    NVMLError = NVMLError

    def __init__(self, percent: list[int], divided: tuple[int, ...] = ()):
        self.percent, self.divided, self.ready = percent, divided, False

    def nvmlInit(self) -> None:
        self.ready = True

    def nvmlDeviceGetCount(self) -> int:
        assert self.ready
        return len(self.percent)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        if handle in self.divided:
            raise NVMLError
        return SimpleNamespace(gpu=self.percent[handle], memory=99)


def test_the_utilization_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library([17, 0, 80], divided=(2,))
    monkeypatch.setitem(sys.modules, "pynvml", library)
    devices = Devices()
    assert devices.utilization() == {"gpu0": 17.0, "gpu1": 0.0}
    library.percent[1] = 100
    assert devices.utilization() == {"gpu0": 17.0, "gpu1": 100.0}


def test_without_a_gpu_that_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Library([]))
    utilization = Devices().utilization()
    assert utilization.keys() == {f"cpu{core}" for core in os.sched_getaffinity(0)}
    assert all(0 <= percent <= 100 for percent in utilization.values())
