"""The op vocabulary: what a decoder is described in, and what a backend must know how to do."""

from typing import Generic, Literal, Protocol, TypeVar

T = TypeVar("T")


class Ops(Protocol, Generic[T]):
    """The op vocabulary. T is a backend's handle of an activation: [rows, width], one row per token of the step.

    The residual stream and everything not named otherwise is float32; a recipe decides what a linear multiplies.
    """

    def embed(self, weight: str) -> T:
        """The embedding of each row's token: [rows, hidden]."""
        ...

    def norm(self, x: T, weight: str) -> T:
        """RMS norm (Zhang and Sennrich, 2019) with `spec.norm_eps`, times the weight."""
        ...

    def linear(self, x: T, weight: str, bias: bool = False, residual: T | None = None) -> T:
        """x Wᵀ, plus the parameter `weight + ".bias"` if `bias`, plus `residual`, which it may overwrite."""
        ...

    def rope_and_cache(self, qkv: T, layer: int, q_norm: str | None, k_norm: str | None) -> T:
        """Split `qkv`, norm each head of q and k if asked, rotate both, write k and v to the KV pages: the queries."""
        ...

    def attention(self, q: T, layer: int, window: int) -> T:
        """Causal attention of each row over its sequence, itself included; over the latest `window` tokens if > 0."""
        ...

    def gated(self, gate_up: T, activation: Literal["silu", "gelu_tanh"]) -> T:
        """activation(gate) * up, the halves of `gate_up`: [rows, intermediate]."""
        ...

    def sampled_rows(self, x: T) -> T:
        """Only the rows named by the batch's `sample_rows`."""
        ...

    def logits(self, x: T, weight: str) -> T:
        """x Wᵀ over the vocabulary."""
        ...
