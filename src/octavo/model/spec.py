"""What a decoder-only transformer looks like, as plain data. A family file produces it; backends compile it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding (Su et al., 2021), on pairs (i, i + dim/2) as in Hugging Face models.

    Pair i turns by theta ** (-2i / dim) / factors[i] radians a position; no factors: all 1. Every kind of scaling
    (linear, llama3, ...) is spelled out as such factors, so that no backend has to know the kinds.
    """

    theta: float = 10000.0
    factors: tuple[float, ...] = ()

    def frequencies(self, dim: int) -> np.ndarray:
        """Radians per position of each pair: float32 [dim / 2]."""
        frequencies: np.ndarray = self.theta ** (-np.arange(0, dim, 2) / dim) / np.array(self.factors or 1.0)
        return frequencies.astype(np.float32)


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes in elements. `windows[i]` is how many latest positions layer i attends to (0: all of them)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: RopeSpec
    windows: tuple[int, ...]
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size
