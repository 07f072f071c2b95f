"""The op vocabulary of model.ops for the cpu backend: every op appends an instruction to a native program."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from octavo.model.decoder import needs_8_bits
from octavo.model.shard import Shard
from octavo.weights.tensor import Parameter, require_finite

from ._native import Activation, Encoding, Program, encoding_for


class Recorder:
    """Ops (see model.ops) whose handles are buffers of the native program.

    `weights` maps the name of each weight that the ops use to its handle. Recording does not pack weights.

    Args:
        shard: the part of the model that is recorded.
        parameters: those of the shard.
    """

    def __init__(self, shard: Shard, program: Program, parameters: Mapping[str, Parameter], quantization: str):
        self.weights: dict[str, int] = {}
        self._shard, self._program, self._parameters, self._quantization = shard, program, parameters, quantization

    def embed(self, weight: str) -> int:
        first_token, _ = self._shard.outputs(weight)
        return self._program.embed(self._weight(weight), first_token, self._ends(weight))

    def norm(self, x: int, weight: str) -> int:
        return self._program.norm(x, self._vector(weight))

    def linear(self, x: int, weight: str, bias: bool = False, residual: int | None = None) -> int:
        bias_vector = self._vector(weight + ".bias") if bias else -1
        return self._program.linear(x, self._weight(weight), bias_vector, -1 if residual is None else residual)

    def rope_and_cache(self, qkv: int, layer: int, q_norm: str | None, k_norm: str | None) -> int:
        q_vector, k_vector = (-1 if name is None else self._vector(name) for name in (q_norm, k_norm))
        return self._program.rope_and_cache(qkv, layer, q_vector, k_vector)

    def attention(self, q: int, layer: int, window: int) -> int:
        return self._program.attention(q, layer, window)

    def gated(self, gate_up: int, activation: Literal["silu", "gelu_tanh"]) -> int:
        return self._program.gated(gate_up, getattr(Activation, activation))

    def all_reduce(self, x: int, weight: str, bias: bool, residual: int) -> int:
        return self._program.all_reduce(x, self._vector(weight + ".bias") if bias else -1, residual)

    def all_gather(self, x: int, weight: str, residual: int | None = None) -> int:
        first_column, columns = self._shard.outputs(weight)
        residual = -1 if residual is None else residual
        return self._program.all_gather(x, first_column, columns, residual, self._ends(weight))

    def gather_rows(self, x: int) -> int:
        return self._program.gather_rows(x)

    def pool_rows(self, x: int, weight: str) -> None:
        self._program.pool_rows(x, self._vector(weight))

    def sampled_rows(self, x: int) -> int:
        return self._program.sampled_rows(x)

    def logits(self, x: int, weight: str) -> int:
        return self.linear(x, weight)

    def _weight(self, name: str) -> int:
        if name not in self.weights:
            rows, columns = self._parameters[name].shape
            encoding, spans = self._encoding(name), self._shard.spans(name)
            self.weights[name] = self._program.weight(rows, columns, encoding, spans)
        return self.weights[name]

    def _ends(self, weight: str) -> list[int]:
        return self._shard.ends(weight, self._program.nodes)

    def _encoding(self, name: str) -> Encoding:
        """Return the encoding in which to store a weight.

        4bit keeps the checkpoint's integers if they have at most 4 bits. 8bit always quantizes again, since products
        are faster with one scale per row.
        """
        own = encoding_for([part.format for part in self._parameters[name].parts])
        if self._quantization in ("auto", "none"):
            return own if self._quantization == "auto" else Encoding.BF16
        eight = self._quantization == "8bit" or needs_8_bits(self._shard.whole, name)
        wanted = Encoding.W8 if eight else Encoding.W4
        return own if self._quantization == "4bit" and own.bits <= wanted.bits else wanted

    def _vector(self, name: str) -> int:
        parts = self._parameters[name].parts
        return self._program.vector(np.concatenate([require_finite(part.name, part.float32()) for part in parts]))
