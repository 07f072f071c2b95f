"""The op vocabulary over the Triton kernels: launches the kernels of one step on the current stream."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo.model.spec import DecoderSpec

from .inputs import StepInputs
from .kernels.attention import attention
from .kernels.embed import embed
from .kernels.gated import gated
from .kernels.linear import linear, merge, partial_sums
from .kernels.norm import add_norm, norm
from .kernels.rope_and_cache import KvPool, rope_and_cache
from .kernels.tree import MOST_SPANS


@dataclass(frozen=True)
class Model:
    """A model on the device.

    Attributes:
        weights: bfloat16, by the names of model/decoder.py.
        rotary: float32 [positions, 2, head_dim / 2], cosines and sines.
    """

    spec: DecoderSpec
    weights: Mapping[str, Tensor]
    rotary: Tensor


@dataclass
class Residual:
    """The residual stream, float32 [N, hidden]: `x`, plus the tree's sum of `partials` and `bias` if they still wait.

    The norm that follows adds them on its way, which saves a kernel.
    """

    x: Tensor
    partials: Tensor | None = None
    bias: Tensor | None = None

    def merged(self) -> Tensor:
        """Return the stream with nothing waiting."""
        if self.partials is not None:
            merge(self.partials, self.x, self.bias, self.x)
            self.partials = None
        return self.x


@dataclass(frozen=True)
class SampledRows:
    """The sampled rows of the residual stream `x`; the norm that follows reads no others."""

    x: Tensor


@dataclass(frozen=True)
class GateUp:
    """A linear layer that `gated` computes together with its activation: its input, weight and bias."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


Handle = Tensor | Residual | SampledRows | GateUp


class CudaOps:
    """The ops of one step (see model.ops.Ops).

    The residual stream, queries, keys and values before rotation, and the logits are float32; what linear layers and
    attention read is bfloat16.
    """

    def __init__(self, model: Model, pool: KvPool, inputs: StepInputs, logits: Tensor):
        """Prepare a step that writes its logits to the first rows of `logits`, float32 [R or more, vocab]."""
        self.model, self.spec, self.weights = model, model.spec, model.weights
        self.pool, self.inputs, self._logits = pool, inputs, logits
        self._spans = spans_of(model.spec)
        self.pooled: Tensor | None = None  # the residual stream that pool_rows was called with, [N, hidden]

    def embed(self, weight: str) -> Handle:
        out = self._new(len(self.inputs.tokens), self.spec.hidden_size, torch.float32)
        embed(self.inputs.tokens, self.weights[weight], out)
        return Residual(out)

    def norm(self, x: Handle, weight: str) -> Handle:
        scale, eps = self.weights[weight], self.spec.norm_eps
        if isinstance(x, SampledRows):
            out = self._new(len(self.inputs.sample_rows), self.spec.hidden_size, torch.bfloat16)
            norm(x.x, scale, eps, out, row_of=self.inputs.sample_rows)
            return out
        assert isinstance(x, Residual)
        out = torch.empty_like(x.x, dtype=torch.bfloat16)
        if x.partials is None:
            norm(x.x, scale, eps, out)
        else:
            add_norm(x.partials, x.x, scale, eps, out, bias=x.bias)
            x.partials = None
        return out

    def linear(self, x: Handle, weight: str, bias: bool = False, residual: Handle | None = None) -> Handle:
        x, matrix = _tensor(x), self.weights[weight]
        vector = self.weights[weight + ".bias"] if bias else None
        kind = weight.rpartition(".")[2]
        if kind == "gate_up":
            return GateUp(x, matrix, vector)
        if residual is None:
            out = self._new(len(x), len(matrix), torch.float32)
            linear(x, matrix, out, bias=vector)
            return out
        assert isinstance(residual, Residual)
        stream, spans = residual.merged(), self._spans[kind]
        partials = partial_sums(x, matrix, spans)
        if partials is None:
            linear(x, matrix, stream, bias=vector, residual=stream, spans=spans)
        return Residual(stream, partials, vector)

    def rope_and_cache(self, qkv: Handle, layer: int, q_norm: str | None, k_norm: str | None) -> Handle:
        spec, qkv = self.spec, _tensor(qkv)
        norms = [None if name is None else self.weights[name] for name in (q_norm, k_norm)]
        queries = self._new(len(qkv), spec.q_size, torch.bfloat16).view(-1, spec.num_heads, spec.head_dim)
        rope_and_cache(qkv, *norms, spec.norm_eps, self.model.rotary, self.inputs.rows, self.pool, layer, queries)
        return queries

    def attention(self, q: Handle, layer: int, window: int) -> Handle:
        queries, inputs = _tensor(q), self.inputs
        out = self._new(len(queries), self.spec.q_size, torch.bfloat16)
        attention(queries, self.pool, inputs.rows, inputs.work, inputs.parts, layer, window, out)
        return out

    def gated(self, gate_up: Handle, activation: Literal["silu", "gelu_tanh"]) -> Handle:
        assert isinstance(gate_up, GateUp), "gated follows the linear layer gate_up"
        out = self._new(len(gate_up.x), len(gate_up.weight) // 2, torch.bfloat16)
        gated(gate_up.x, gate_up.weight, out, activation, bias=gate_up.bias)
        return out

    def pool_rows(self, x: Handle, weight: str) -> None:
        assert isinstance(x, Residual)
        self.pooled = x.merged()

    def sampled_rows(self, x: Handle) -> Handle:
        assert isinstance(x, Residual)
        return SampledRows(x.merged())

    def logits(self, x: Handle, weight: str) -> Handle:
        x = _tensor(x)
        linear(x, self.weights[weight], self._logits[: len(x)])
        return self._logits[: len(x)]

    def _new(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, width), dtype=dtype, device=self.inputs.tokens.device)


def spans_of(spec: DecoderSpec) -> dict[str, int]:
    """Return the spans that `out` and `down` sum in (design.md, "Order of sums"): at most 8, whole heads in `out`."""
    return {"out": _most_spans(spec.num_heads), "down": _most_spans(spec.intermediate_size)}


def _most_spans(parts: int) -> int:
    """Return the largest divisor of `parts` up to 8."""
    return max(n for n in range(1, MOST_SPANS + 1) if parts % n == 0)


def _tensor(handle: Handle) -> Tensor:
    assert isinstance(handle, Tensor), "this op reads what a norm, a linear layer or attention returned"
    return handle
