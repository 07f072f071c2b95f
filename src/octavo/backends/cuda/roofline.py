"""What octavo bench roofline measures of a GPU: its peak rates, and how much of a step's time the device computes."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from octavo.model.spec import DecoderSpec

from .kernels.rotation import Int8Rows
from .weights import Weights, head_of, nbytes

_COPIED, _WIDTH = 4 << 30, 8192  # bytes, and the rows and columns of the matrices, for a GPU
_RUNS = 9


class DeviceClock:
    """Adds up the time in which the device computes steps, while it is on.

    Without a GPU (in Triton's interpreter), this is the time until the step is launched.
    """

    def __init__(self, device: torch.device):
        self._events, self._on = device.type == "cuda", False
        self._steps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def profile(self, on: bool) -> None:
        """Start from zero, or stop."""
        self._on, self._seconds = on, 0.0
        self._steps.clear()

    def seconds(self) -> float:
        """Return the seconds so far. Waits for the steps that are under way."""
        for start, end in self._steps:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        self._steps.clear()
        return self._seconds

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count what is launched in the block on the current stream as a step."""
        if not self._on:
            yield
        elif self._events:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._steps.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began


class Meter:
    """The figures of a model on a device that octavo bench roofline asks for (see bench.roofline.Meter)."""

    def __init__(self, spec: DecoderSpec, weights: Weights, page_size: int, page_bytes: int, name: str):
        """Describe a model.

        Args:
            name: of the device.
        """
        self.spec, self.page_size, self.page_bytes, self.isa = spec, page_size, page_bytes, name
        self._device = next(weight.device for weight in weights.values() if isinstance(weight, Tensor))
        self.clock = DeviceClock(self._device)
        head = weights.get(head_of("embed"), weights["embed"]) if spec.tied_embeddings else weights["head"]
        layers = [weight for name, weight in weights.items() if name.startswith("layers.")]
        self.head_bytes, self.layer_bytes = nbytes(head), sum(map(nbytes, layers))
        self.head_integers = self.layer_integers = float(any(isinstance(each, Int8Rows) for each in layers))

    def ceilings(self) -> tuple[float, float, float]:
        """Measure the device: bytes copied per second, and operations per second of bf16 and of int8 products.

        A copied byte counts twice, as it is read and written. A multiplication and an addition are two operations.
        """
        on_gpu = self._device.type == "cuda"
        copied, width = (_COPIED, _WIDTH) if on_gpu else (1 << 24, 256)
        return copy_rate(self._device, copied), matmul_rate(self._device, width), int8_rate(self._device, width)

    def profile(self, on: bool) -> None:
        """Start measuring the device's time, from zero, or stop."""
        self.clock.profile(on)

    def times(self) -> dict[str, float]:
        """Return the seconds since profile(True) in which the device has computed steps."""
        return {"device": self.clock.seconds()}


def copy_rate(device: torch.device, size: int) -> float:
    """Return the bytes read and written per second by a kernel that copies `size` bytes, or by the driver's copy."""
    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ways = (lambda: torch.bitwise_not(source, out=target), lambda: target.copy_(source))
    return 2 * source.nbytes / min(_seconds(way, device) for way in ways)


def matmul_rate(device: torch.device, width: int) -> float:
    """Return the operations per second of PyTorch's product of bfloat16 matrices, `width` x `width`."""
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    return 2 * width**3 / _seconds(lambda: torch.mm(a, b.T), device)


def int8_rate(device: torch.device, width: int) -> float:
    """Return the same of int8 matrices, whose products are summed in int32."""
    a, b = (torch.randint(-127, 128, (width, width), device=device).to(torch.int8) for _ in range(2))
    return 2 * width**3 / _seconds(lambda: torch._int_mm(a, b.T), device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call on the device."""
    clock, times = DeviceClock(device), []
    call()
    for _ in range(_RUNS):
        clock.profile(True)
        with clock.step():
            call()
        times.append(clock.seconds())
    return statistics.median(times)
