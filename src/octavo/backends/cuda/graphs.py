"""CUDA graphs of decode steps: one row for each sequence, in a few sizes, replayed in one call."""

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from octavo.backends.base import SamplingBatch, StepBatch

from .ops import StepInputs

Forward = Callable[[StepInputs], Tensor]
"""Launches the kernels of a step, and returns the logits."""

_SHORTEST_CONTEXT = 1024


@dataclass(frozen=True)
class _Graph:
    graph: "torch.cuda.CUDAGraph"
    logits: Tensor  # what a replay writes


class DecodeGraphs:
    """The graphs captured so far, by rows and context. Memory of the graphs' tensors is shared among them.

    Contexts are rounded up to powers of two, because a graph launches as many programs as its longest context needs.
    Graphs of the shortest contexts are captured at start, as many as the time limit allows; others when a step needs
    them. The inputs of steps of as many rows must always lie at the same addresses.
    """

    def __init__(self, forward: Forward, max_model_len: int):
        self._forward, self._max_model_len = forward, max_model_len
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, sizes: list[int], inputs: Callable[[int], StepInputs], seconds: float) -> int:
        """Capture the graphs of `sizes` rows, for about `seconds`. Returns how many there are.

        Args:
            inputs: returns the inputs of a step of so many rows, with the shortest context.
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
        context = rounded_context(inputs.longest_context, self._max_model_len)
        key = (len(inputs.tokens), context)
        if key not in self._graphs:
            inputs = replace(inputs, longest_context=context)
            self._forward(inputs)  # compiles kernels, which a capture must not
            stream = torch.cuda.current_stream()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                logits = self._forward(inputs)
            self._graphs[key] = _Graph(graph, logits)
        return self._graphs[key]


def sizes(max_batch_size: int) -> list[int]:
    """Return the numbers of rows that graphs are captured for: 1, 2, 4, then steps of 8 to `max_batch_size` or more."""
    return [*(size for size in (1, 2, 4) if size < max_batch_size), *range(8, max_batch_size + 8, 8)]


def size_for(rows: int, sizes: list[int]) -> int | None:
    """Return the least of `sizes` that is at least `rows`, if there is one."""
    at = bisect.bisect_left(sizes, rows)
    return sizes[at] if rows and at < len(sizes) else None


def rounded_context(length: int, most: int) -> int:
    """Return `length` rounded up to a power of two, at least 1024 and at most `most`."""
    return min(most, max(_SHORTEST_CONTEXT, 1 << (length - 1).bit_length()))


def is_decode(batch: StepBatch) -> bool:
    """Return whether each sequence of a step has one row."""
    return len(batch.tokens) == len(batch.page_tables) and batch.pooling is None


def padded(batch: StepBatch, size: int) -> StepBatch:
    """Return a decode step with `size` rows. The added rows, at position -1, read and write nothing of the pool."""
    rows, width = batch.page_tables.shape
    more = size - rows
    none = np.zeros(more, np.int32)
    return replace(
        batch,
        tokens=np.concatenate([batch.tokens, none]),
        positions=np.concatenate([batch.positions, none - 1]),
        query_start=np.arange(size + 1, dtype=np.int32),
        page_tables=np.concatenate([batch.page_tables, np.zeros((more, width), np.int32)]),
        sample_rows=np.concatenate([batch.sample_rows, np.zeros(size - len(batch.sample_rows), np.int32)]),
    )


def empty_step() -> StepBatch:
    """Return a decode step of no rows."""
    none = np.zeros(0, np.int32)
    return StepBatch(none, none, np.zeros(1, np.int32), np.zeros((0, 1), np.int32), none, SamplingBatch.greedy(0))
