"""The op vocabulary over PyTorch tensors, run eagerly, one step at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from octavo.backends.base import StepBatch
from octavo.model.spec import DecoderSpec


@dataclass(frozen=True)
class KvPool:
    """The KV pool: keys and values of shape [pages, layers, page_size, kv_heads, head_dim] each."""

    keys: Tensor
    values: Tensor


class TorchOps:
    """The ops of one step (see model.ops.Ops). Activations are float32; linear layers multiply values of `dtype`."""

    def __init__(
        self, spec: DecoderSpec, weights: Mapping[str, Tensor], dtype: torch.dtype, pool: KvPool, batch: StepBatch
    ):
        self.spec, self.weights, self.dtype, self.pool = spec, weights, dtype, pool
        device = pool.keys.device

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array.astype(np.int64)).to(device)

        self.tokens, self.sample_rows = on_device(batch.tokens), on_device(batch.sample_rows)
        self.positions, self.page_tables = on_device(batch.positions), on_device(batch.page_tables)
        lengths = np.diff(batch.query_start)
        self.lengths = lengths.tolist()
        page_size = pool.keys.shape[2]
        sequence = torch.repeat_interleave(on_device(lengths))
        self.pages = self.page_tables[sequence, self.positions // page_size]
        self.slots = self.positions % page_size
        angles = self.positions[:, None] * torch.from_numpy(spec.rope.frequencies(spec.head_dim)).to(device)
        self.cos, self.sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
        self.pooling = batch.pooling
        self.sums: np.ndarray | None = None  # see StepResult

    def embed(self, weight: str) -> Tensor:
        return self.weights[weight][self.tokens].float()

    def norm(self, x: Tensor, weight: str) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[weight].float(), self.spec.norm_eps)

    def linear(self, x: Tensor, weight: str, bias: bool = False, residual: Tensor | None = None) -> Tensor:
        y = _matmul(x, self.weights[weight], self.dtype)
        if bias:
            y = y + self.weights[weight + ".bias"].float()
        return y if residual is None else y + residual

    def rope_and_cache(self, qkv: Tensor, layer: int, q_norm: str | None, k_norm: str | None) -> Tensor:
        spec = self.spec
        q, k, v = torch.split(qkv, [spec.q_size, spec.kv_size, spec.kv_size], dim=1)
        q, k, v = (part.reshape(len(part), -1, spec.head_dim) for part in (q, k, v))
        if q_norm is not None and k_norm is not None:
            q, k = self.norm(q, q_norm), self.norm(k, k_norm)
        self.pool.keys[self.pages, layer, self.slots] = self._rotate(k).to(self.pool.keys.dtype)
        self.pool.values[self.pages, layer, self.slots] = v.to(self.pool.values.dtype)
        return self._rotate(q)

    def _rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1)

    def attention(self, q: Tensor, layer: int, window: int) -> Tensor:
        queries, positions = torch.split(q, self.lengths), torch.split(self.positions, self.lengths)
        sequences = zip(queries, positions, self.page_tables, strict=True)
        return torch.cat([self._attend(q, p, pages, layer, window) for q, p, pages in sequences if len(q)])

    def _attend(self, q: Tensor, positions: Tensor, page_table: Tensor, layer: int, window: int) -> Tensor:
        """Return the attention of one sequence's rows, [rows, q_size], from q of shape [rows, heads, head_dim]."""
        length = int(positions[-1]) + 1
        pages = page_table[: -(-length // self.pool.keys.shape[2])]
        group = self.spec.num_heads // self.spec.num_kv_heads
        k, v = (
            part[pages, layer].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
            for part in (self.pool.keys, self.pool.values)
        )
        distance = positions[:, None] - torch.arange(length, device=q.device)
        seen = (distance >= 0) & (distance < window) if window else distance >= 0
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.spec.head_dim**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)

    def gated(self, gate_up: Tensor, activation: Literal["silu", "gelu_tanh"]) -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up

    def pool_rows(self, x: Tensor, weight: str) -> None:
        if self.pooling is None:
            return
        hidden = self.norm(x, weight).double()
        ranges = zip(self.pooling.sums, self.pooling.first.tolist(), self.pooling.end.tolist(), strict=True)
        sums = [before + hidden[first:end].sum(dim=0).cpu().numpy() for before, first, end in ranges]
        self.sums = np.array(sums).reshape(self.pooling.sums.shape)

    def sampled_rows(self, x: Tensor) -> Tensor:
        return x[self.sample_rows]

    def logits(self, x: Tensor, weight: str) -> Tensor:
        return _matmul(x, self.weights[weight], self.dtype)


def _matmul(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x Wᵀ of values rounded to `dtype`, summed in float32."""
    if dtype == torch.float32:
        return x @ weight.T
    if weight.device.type == "cuda":
        return torch.mm(x.to(dtype), weight.T, out_dtype=torch.float32)
    return x.to(dtype).float() @ weight.T.float()
