"""CUDA graphs of decode steps: one row for each sequence, in a few sizes, replayed in one call."""

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.backends.base import SamplingBatch, StepBatch

from .inputs import StepInputs

Forward = Callable[[StepInputs], Tensor]
"""Launches the kernels of a step, and returns the logits."""


@dataclass(frozen=True)
class _Graph:
    graph: "torch.cuda.CUDAGraph"
    logits: Tensor  # what a replay writes


class DecodeGraphs:
    """The graphs captured so far, by rows. Memory of the graphs' tensors is shared among them.

    As many as the time limit allows are captured at start, those of few rows first; others when a step needs them. The
    inputs of steps of as many rows must always lie at the same addresses.
    """

    def __init__(self, forward: Forward):
        self._forward = forward
        self._graphs: dict[int, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, sizes: list[int], inputs: Callable[[int], StepInputs], seconds: float) -> int:
        """Capture the graphs of `sizes` rows, for about `seconds`. Returns how many there are.

        Args:
            inputs: returns the inputs of a step of so many rows. None of its tensors may be empty: an empty tensor has
                no address.
        """
        end = time.monotonic() + seconds
        for size in sizes:
            if time.monotonic() > end:
                break
            self._graph(inputs(size))
        return len(self._graphs)

    def replay(self, inputs: StepInputs) -> Tensor:
        """Run a decode step. Returns the logits."""
        graph = self._graph(inputs)
        graph.graph.replay()
        return graph.logits

    def _graph(self, inputs: StepInputs) -> _Graph:
        size = len(inputs.tokens)
        if size not in self._graphs:
            self._forward(inputs)  # compiles kernels, which a capture must not
            stream = torch.cuda.current_stream()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                logits = self._forward(inputs)
            self._graphs[size] = _Graph(graph, logits)
        return self._graphs[size]


def sizes(max_batch_size: int) -> list[int]:
    """Return the numbers of rows that graphs are captured for: 1, 2, 4, then steps of 8 to `max_batch_size` or more."""
    return [*(size for size in (1, 2, 4) if size < max_batch_size), *range(8, max_batch_size + 8, 8)]


def size_for(rows: int, sizes: list[int]) -> int | None:
    """Return the least of `sizes` that is at least `rows`, if there is one."""
    at = bisect.bisect_left(sizes, rows)
    return sizes[at] if rows and at < len(sizes) else None


def is_decode(batch: StepBatch) -> bool:
    """Return whether each sequence of a step has one row."""
    return len(batch.tokens) == len(batch.page_tables) and batch.pooling is None


def first_step(rows: int) -> StepBatch:
    """Return a greedy decode step of `rows` rows, which all write to the first position of page 0."""
    none = np.zeros(rows, np.int32)
    one_each = np.arange(rows + 1, dtype=np.int32)
    return StepBatch(none, none, one_each, none[:, None], one_each[:-1], SamplingBatch.greedy(rows))
