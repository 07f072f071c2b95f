"""The operations of which a decoder is composed. Every backend implements them."""

from typing import Generic, Literal, Protocol, TypeVar

T = TypeVar("T")


class Ops(Protocol, Generic[T]):
    """The operations of a decoder. T is a backend's handle of an activation [rows, width], a row per token of the step.

    Activations are float32 unless said otherwise. The types that a linear multiplies depend on the quantization.
    """

    def embed(self, weight: str) -> T:
        """Return the embedding of each row's token: [rows, hidden]. A rank gets those that it lacks from the others."""
        ...

    def norm(self, x: T, weight: str) -> T:
        """Return x / sqrt(mean(x²) + spec.norm_eps) * weight (RMS norm, Zhang and Sennrich, 2019), row by row."""
        ...

    def linear(self, x: T, weight: str, bias: bool = False, residual: T | None = None) -> T:
        """Return x Wᵀ, plus the parameter `weight + ".bias"` if `bias`, plus `residual`, which may be overwritten."""
        ...

    def rope_and_cache(self, qkv: T, layer: int, q_norm: str | None, k_norm: str | None) -> T:
        """Split `qkv` into q, k and v; norm each head of q and k where a norm is given; rotate q and k by position.

        Writes k and v to the KV cache of `layer` and returns q: [rows, q_size].
        """
        ...

    def attention(self, q: T, layer: int, window: int) -> T:
        """Return causal attention of each row over its sequence, up to and including itself: [rows, q_size].

        With `window` > 0, only over the latest `window` tokens.
        """
        ...

    def gated(self, gate_up: T, activation: Literal["silu", "gelu_tanh"]) -> T:
        """Return activation(gate) * up, where gate and up are the halves of `gate_up`: [rows, intermediate]."""
        ...

    def pool_rows(self, x: T, weight: str) -> None:
        """Add norm(x, weight), in float32, to the sums of the batch's PoolingBatch, if there is one."""
        ...

    def sampled_rows(self, x: T) -> T:
        """Return the rows that the batch's `sample_rows` lists."""
        ...

    def logits(self, x: T, weight: str) -> T:
        """Return x Wᵀ over the vocabulary: [rows, vocab]."""
        ...


class Collectives(Ops[T], Protocol[T]):
    """The operations of a model that is divided over ranks (see shard.py), for backends that support this.

    Some activations are the same in all ranks. Of others, each rank has some columns, or a part of the sum: then a
    collective operation follows.
    """

    def all_reduce(self, x: T, weight: str, bias: bool, residual: T) -> T:
        """Return the sum of all ranks' `x`, their parts of the linear `weight`, plus bias and residual as in linear."""
        ...

    def all_gather(self, x: T, weight: str, residual: T | None = None) -> T:
        """Return the columns `x` of all ranks side by side: the result of the linear `weight`. Adds `residual`."""
        ...

    def gather_rows(self, x: T) -> T:
        """Return the attention `x` of all rows, of which each rank has computed some."""
        ...
