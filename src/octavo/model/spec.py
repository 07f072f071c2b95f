"""The description of a decoder-only transformer as plain data. A family creates it; backends compile it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al., 2021), on pairs (i, i + dim / 2) as in Hugging Face models.

    Pair i is rotated by theta ** (-2i / dim) / factors[i] radians per position. If there are no factors, all are 1.
    Every type of scaling (linear, llama3, ...) is converted to such factors, so backends need not know the types.
    """

    theta: float = 10000.0
    factors: tuple[float, ...] = ()

    def frequencies(self, dim: int) -> np.ndarray:
        """Return the radians per position of each pair: float32 [dim / 2]."""
        frequencies: np.ndarray = self.theta ** (-np.arange(0, dim, 2) / dim) / np.array(self.factors or 1.0)
        return frequencies.astype(np.float32)


@dataclass(frozen=True)
class DecoderSpec:
    """A variant of the decoder in decoder.py. Sizes are in elements.

    `windows[i]` is the number of latest positions that layer i attends to, 0 for all. `max_positions` is the largest
    number of tokens in a sequence.

    If `ranks` > 1, the model is divided over so many processes, and heads and intermediate size are those of one of
    them (see shard.py); with `whole_attention`, each of them has all heads.
    """

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
    ranks: int = 1
    whole_attention: bool = False

    @property
    def q_size(self) -> int:
        """Return the width of the queries of all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Return the width of the keys of all heads, which is also that of the values."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Return the width of queries, keys and values together."""
        return self.q_size + 2 * self.kv_size
