"""Time kernels on the device, and measure its limits."""

import statistics
from collections.abc import Callable, Sequence

import torch


def device_seconds(calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
    """Return the median time of one of `calls`, which run one after another in a CUDA graph.

    Give calls that read different memory, together more than the L2 cache holds.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        for _ in range(repeats + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """Return bytes read and written per second by a kernel that copies 4 GiB, or by the driver if that is faster."""
    source = torch.empty(1 << 30, dtype=torch.int32, device="cuda").zero_()
    target = torch.empty_like(source)
    ways = (lambda: torch.bitwise_not(source, out=target), lambda: target.copy_(source))
    return 2 * source.nbytes / min(device_seconds([way] * 4, repeats=9) for way in ways)


def matmul_peak() -> float:
    """Return operations per second of cuBLAS for bfloat16 matrices of 8192 x 8192."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / device_seconds([lambda: torch.mm(a, b.T)] * 4)
