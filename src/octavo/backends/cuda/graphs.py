"""CUDA graphs: a step's kernels, recorded once for each size of a step, and launched in one call."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .graph_shapes import GraphShape
from .inputs import StepInputs

Forward = Callable[[StepInputs], Tensor]
"""Launches the kernels of a step, and returns the logits."""


@dataclass(frozen=True)
class _Graph:
    graph: "torch.cuda.CUDAGraph"
    logits: Tensor  # what a replay writes


class Graphs:
    """The graphs captured so far. Their tensors share one pool of memory.

    A step captures the graph that it is the first to need. The inputs of all steps of a shape must lie at the same
    addresses.
    """

    def __init__(self, forward: Forward):
        self._forward = forward
        self._graphs: dict[GraphShape, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, inputs: StepInputs) -> None:
        """Capture the graph of a step's shape. None of its tensors may be empty: an empty tensor has no address."""
        self._graph(inputs)

    def replay(self, inputs: StepInputs) -> Tensor:
        """Run a step that has a shape. Returns the logits."""
        graph = self._graph(inputs)
        graph.graph.replay()
        return graph.logits

    def _graph(self, inputs: StepInputs) -> _Graph:
        assert inputs.shape is not None, "the step has no shape"
        if inputs.shape not in self._graphs:
            self._forward(inputs)  # compiles kernels, which a capture must not
            stream = torch.cuda.current_stream()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                logits = self._forward(inputs)
            self._graphs[inputs.shape] = _Graph(graph, logits)
        return self._graphs[inputs.shape]
