"""The op vocabulary over the Triton kernels: launches the kernels of one step on the current stream."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Literal

import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.model.shard import Shard, divides_heads, sizes_for
from octavo.model.spans import UNIT, span_ends
from octavo.model.spec import DecoderSpec

from .collectives import Group
from .inputs import StepInputs
from .kernels import four_bit_linear
from .kernels.attention import attention
from .kernels.embed import embed
from .kernels.four_bits import FourBits
from .kernels.gated import gated
from .kernels.integer_linear import integer_gated, integer_linear
from .kernels.integer_linear import partial_sums as integer_partial_sums
from .kernels.linear import linear, merge, partial_sums
from .kernels.norm import add_norm, add_norm_int8, norm, norm_int8
from .kernels.rope_and_cache import KvPool, rope_and_cache
from .kernels.rotation import Int8Rows, quantize_rows
from .weights import Matrix, Weights, head_of


@dataclass(frozen=True)
class Model:
    """A model on the device.

    Attributes:
        shard: which part of the model it is.
        weights: by the names of model/decoder.py: bfloat16, or integers for matrices of linear layers (weights.py).
        rotary: float32 [positions, 2, head_dim / 2], cosines and sines.
        group: the ranks, if there are several.
    """

    shard: Shard
    weights: Weights
    rotary: Tensor
    group: Group | None = None

    @cached_property
    def spec(self) -> DecoderSpec:
        """Return the sizes of this part."""
        return self.shard.spec

    @cached_property
    def spans(self) -> dict[str, int]:
        """Return in how many spans `out` and `down` of this part sum."""
        return spans_of_shard(self.shard)

    @cached_property
    def columns(self) -> dict[str, list[range]]:
        """Return which of the outputs each rank has, of the weights that are divided by rows, by kind."""
        found = {}
        for weight in ("embed", "layers.0.qkv", "layers.0.out"):
            outputs = [replace(self.shard, rank=rank).outputs(weight) for rank in range(self.shard.size)]
            starts = [start for start, _ in outputs]
            found[_kind(weight)] = list(map(range, starts, [*starts[1:], outputs[0][1]]))
        return found | {"head": found["embed"]}


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

    x: Tensor | Int8Rows
    weight: Matrix
    bias: Tensor | None


Handle = Tensor | Int8Rows | Residual | SampledRows | GateUp


class CudaOps:
    """The ops of one step (see model.ops.Ops).

    The residual stream, queries, keys and values before rotation, and the logits are float32; what linear layers and
    attention read is bfloat16, or for linear layers of int8 rows of int8.
    """

    def __init__(self, model: Model, pool: KvPool, inputs: StepInputs, logits: Tensor):
        """Prepare a step that writes its logits to the first rows of `logits`, float32 [R or more, vocab]."""
        self.model, self.spec, self.weights = model, model.spec, model.weights
        self.pool, self.inputs, self._logits = pool, inputs, logits
        self._spans = model.spans
        self._int8 = isinstance(model.weights["layers.0.qkv"], Int8Rows)
        self.pooled: Tensor | None = None  # the residual stream that pool_rows was called with, [N, hidden]

    def embed(self, weight: str) -> Handle:
        out = self._new(len(self.inputs.tokens), self.spec.hidden_size, torch.float32)
        first = self.model.columns["embed"][self.model.shard.rank].start
        embed(self.inputs.tokens, self.inputs.kept, _tensor(self.weights[weight]), out, first=first)
        if self.model.group is not None:
            self.model.group.fill(out)
        return Residual(out)

    def norm(self, x: Handle, weight: str) -> Handle:
        scale, eps = _tensor(self.weights[weight]), self.spec.norm_eps
        if isinstance(x, SampledRows):
            if self._int8:
                return norm_int8(x.x, scale, eps, row_of=self.inputs.sample_rows)
            out = self._new(len(self.inputs.sample_rows), self.spec.hidden_size, torch.bfloat16)
            norm(x.x, scale, eps, out, row_of=self.inputs.sample_rows)
            return out
        assert isinstance(x, Residual)
        if self._int8:
            if x.partials is None:
                return norm_int8(x.x, scale, eps)
            integers = add_norm_int8(x.partials, x.x, scale, eps, bias=x.bias)
            x.partials = None
            return integers
        out = torch.empty_like(x.x, dtype=torch.bfloat16)
        if x.partials is None:
            norm(x.x, scale, eps, out)
        else:
            add_norm(x.partials, x.x, scale, eps, out, bias=x.bias)
            x.partials = None
        return out

    def linear(self, x: Handle, weight: str, bias: bool = False, residual: Handle | None = None) -> Handle:
        matrix = self.weights[weight]
        vector = _tensor(self.weights[weight + ".bias"]) if bias else None
        kind = _kind(weight)
        if kind == "gate_up":
            assert isinstance(x, Tensor | Int8Rows)
            return GateUp(x, matrix, vector)
        if residual is None:
            out = self._new(self._rows, _outputs(matrix), torch.float32)
            self._multiply(x, matrix, out, vector, None, self._spans.get(kind, 1))
            return out
        stream = _stream(residual)
        if isinstance(matrix, Int8Rows):
            integers = _int8(x, matrix.spans)
            partials = integer_partial_sums(integers, matrix)
            if partials is None:
                integer_linear(integers, matrix, stream, bias=vector, residual=stream)
            return Residual(stream, partials, vector)
        spans, rows = self._spans[kind], _tensor(x)
        if isinstance(matrix, FourBits):
            partials = four_bit_linear.partial_sums(rows, matrix, spans)
            if partials is None:
                four_bit_linear.linear(rows, matrix, stream, bias=vector, residual=stream, spans=spans)
        else:
            partials = partial_sums(rows, matrix, spans)
            if partials is None:
                linear(rows, matrix, stream, bias=vector, residual=stream, spans=spans)
        return Residual(stream, partials, vector)

    def _multiply(
        self, x: Handle, matrix: Matrix, out: Tensor, bias: Tensor | None, residual: Tensor | None, spans: int = 1
    ) -> None:
        """Compute out = x matrixᵀ + bias + residual."""
        if isinstance(matrix, Int8Rows):
            integer_linear(_int8(x, matrix.spans), matrix, out, bias=bias, residual=residual)
        elif isinstance(matrix, FourBits):
            four_bit_linear.linear(_tensor(x), matrix, out, bias=bias, residual=residual, spans=spans)
        else:
            linear(_tensor(x), matrix, out, bias=bias, residual=residual, spans=spans)

    def all_reduce(self, x: Handle, weight: str, bias: bool, residual: Handle) -> Handle:
        vector = _tensor(self.weights[weight + ".bias"]) if bias else None
        return Residual(_stream(residual), self._group.all_sums(_tensor(x)), vector)

    def all_gather(self, x: Handle, weight: str, residual: Handle | None = None) -> Handle:
        part, columns = _tensor(x), self.model.columns[_kind(weight)]
        width = max(map(len, columns))
        if part.shape[1] < width:  # of equal sizes, as the exchange needs them
            part = torch.nn.functional.pad(part, (0, width - part.shape[1]))
        of_ranks = self._group.all_gather(part)
        is_head = weight in ("head", "embed")
        out = self._logits[: len(part)] if is_head else self._new(len(part), columns[-1].stop, torch.float32)
        for values, place in zip(of_ranks, columns, strict=True):
            out[:, place.start : place.stop] = values[:, : len(place)]
        if residual is None:
            return out
        return Residual(_stream(residual).add_(out))

    def gather_rows(self, x: Handle) -> Handle:
        return x  # each rank has computed the attention of all rows

    @property
    def _group(self) -> Group:
        assert self.model.group is not None, "only ranks exchange"
        return self.model.group

    def rope_and_cache(self, qkv: Handle, layer: int, q_norm: str | None, k_norm: str | None) -> Handle:
        spec, qkv = self.spec, _tensor(qkv)
        of_q, of_k = (None if name is None else _tensor(self.weights[name]) for name in (q_norm, k_norm))
        queries = self._new(len(qkv), spec.q_size, torch.bfloat16).view(-1, spec.num_heads, spec.head_dim)
        rope_and_cache(qkv, of_q, of_k, spec.norm_eps, self.model.rotary, self.inputs.rows, self.pool, layer, queries)
        return queries

    def attention(self, q: Handle, layer: int, window: int) -> Handle:
        queries, inputs = _tensor(q), self.inputs
        out = self._new(len(queries), self.spec.q_size, torch.bfloat16)
        attention(queries, self.pool, inputs.rows, inputs.work, inputs.parts, layer, window, out)
        return out

    def gated(self, gate_up: Handle, activation: Literal["silu", "gelu_tanh"]) -> Handle:
        assert isinstance(gate_up, GateUp), "gated follows the linear layer gate_up"
        weight = gate_up.weight
        out = self._new(self._rows, _outputs(weight) // 2, torch.bfloat16)
        if isinstance(weight, Int8Rows):
            integer_gated(_int8(gate_up.x, weight.spans), weight, out, activation, bias=gate_up.bias)
        elif isinstance(weight, FourBits):
            four_bit_linear.gated(_tensor(gate_up.x), weight, out, activation, bias=gate_up.bias)
        else:
            gated(_tensor(gate_up.x), weight, out, activation, bias=gate_up.bias)
        return out

    def pool_rows(self, x: Handle, weight: str) -> None:
        self.pooled = _stream(x)

    def sampled_rows(self, x: Handle) -> Handle:
        return SampledRows(_stream(x))

    def logits(self, x: Handle, weight: str) -> Handle:
        matrix, rows = self.weights.get(head_of(weight), self.weights[weight]), len(self.inputs.sample_rows)
        whole = self.model.group is None
        out = self._logits[:rows] if whole else self._new(rows, _outputs(matrix), torch.float32)
        self._multiply(x, matrix, out, None, None)
        return out

    @property
    def _rows(self) -> int:
        return len(self.inputs.tokens)

    def _new(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, width), dtype=dtype, device=self.inputs.tokens.device)


def spans_of(spec: DecoderSpec) -> dict[str, int]:
    """Return how many equal spans `out` and `down` sum in: those of model/spans.py, or half, a quarter or an eighth as
    many where those are not of equal length."""
    found = {}
    for name in ("out", "down"):
        ends = span_ends(spec, f".{name}")
        found[name] = 1 if ends[-1] % UNIT else gcd(ends[-1] // UNIT, len(ends))
    return found


def spans_of_shard(shard: Shard) -> dict[str, int]:
    """Return in how many spans `out` and `down` of a part of a model sum."""
    whole = spans_of(shard.whole)
    cuts_out = divides_heads(shard.whole, shard.size)
    return {"out": whole["out"] // (shard.size if cuts_out else 1), "down": whole["down"] // shard.size}


def check_ranks(spec: DecoderSpec, size: int) -> None:
    """Raise ConfigError if a model cannot be divided over `size` GPUs: each needs as many equal spans as any other."""
    sizes = [n for n in sizes_for(spec) if all(count % n == 0 for count in _spans_to_divide(spec, n))]
    if size not in sizes:
        raise ConfigError(
            f"tensor_parallel_size must be {' or '.join(map(str, sizes))} for this model on GPUs, not {size}: its "
            "layers cannot be divided further into equal parts"
        )


def _spans_to_divide(spec: DecoderSpec, size: int) -> list[int]:
    spans = spans_of(spec)
    return [spans["down"], spans["out"]] if divides_heads(spec, size) else [spans["down"]]


def _kind(weight: str) -> str:
    return weight.rpartition(".")[2]


def _tensor(handle: Handle | FourBits) -> Tensor:
    assert isinstance(handle, Tensor), "this op reads what a norm, a linear layer or attention returned"
    return handle


def _stream(handle: Handle) -> Tensor:
    """Return the residual stream with nothing waiting."""
    assert isinstance(handle, Residual), "this op reads the residual stream"
    return handle.merged()


def _int8(x: Handle, spans: int) -> Int8Rows:
    return x if isinstance(x, Int8Rows) else quantize_rows(_tensor(x), spans)


def _outputs(matrix: Matrix) -> int:
    return len(matrix) if isinstance(matrix, Tensor) else len(matrix.values)
