"""The forward pass of all supported decoder-only models, written once in terms of the operations in ops.py."""

from typing import cast

from .ops import Collectives, Ops, T
from .spec import DecoderSpec

# Parameters by canonical name and shape. Weights are [outputs, inputs], "{i}" is a layer:
#   embed                      [vocab, hidden]
#   layers.{i}.attn_norm       [hidden]
#   layers.{i}.qkv (.bias)     [q + k + v, hidden]: query, key and value projections, stacked
#   layers.{i}.q_norm, k_norm  [head_dim], if spec.qk_norm
#   layers.{i}.out (.bias)     [hidden, q]
#   layers.{i}.mlp_norm        [hidden]
#   layers.{i}.gate_up (.bias) [2 * intermediate, hidden]: gate over up, stacked
#   layers.{i}.down (.bias)    [hidden, intermediate]
#   norm                       [hidden]
#   head                       [vocab, hidden]; absent if spec.tied_embeddings, where `embed` is used instead


def describe(spec: DecoderSpec, ops: Ops[T]) -> T:
    """Run the forward pass through `ops`. Returns the logits of the sampled rows."""
    x = ops.embed("embed")
    for i in range(spec.num_layers):
        x = describe_layer(spec, i, ops, x)
    ops.pool_rows(x, "norm")
    head = "embed" if spec.tied_embeddings else "head"
    logits = ops.logits(ops.norm(ops.sampled_rows(x), "norm"), head)
    return logits if spec.ranks == 1 else _collectives(ops).all_gather(logits, head)


def describe_layer(spec: DecoderSpec, i: int, ops: Ops[T], x: T) -> T:
    """Run layer `i` on the residual stream `x`. Returns the residual stream after it."""
    layer = f"layers.{i}."
    qkv = ops.linear(ops.norm(x, layer + "attn_norm"), layer + "qkv", bias=spec.qkv_bias)
    if spec.whole_attention:
        qkv = _collectives(ops).all_gather(qkv, layer + "qkv")
    q_norm, k_norm = (layer + "q_norm", layer + "k_norm") if spec.qk_norm else (None, None)
    q = ops.rope_and_cache(qkv, i, q_norm=q_norm, k_norm=k_norm)
    attended = ops.attention(q, i, spec.windows[i])
    if spec.whole_attention:
        attended = _collectives(ops).gather_rows(attended)
        some = ops.linear(attended, layer + "out", bias=spec.output_bias)
        x = _collectives(ops).all_gather(some, layer + "out", residual=x)
    else:
        x = _summed(spec, ops, attended, layer + "out", spec.output_bias, x)
    gate_up = ops.linear(ops.norm(x, layer + "mlp_norm"), layer + "gate_up", bias=spec.mlp_bias)
    return _summed(spec, ops, ops.gated(gate_up, spec.activation), layer + "down", spec.mlp_bias, x)


def _summed(spec: DecoderSpec, ops: Ops[T], x: T, weight: str, bias: bool, residual: T) -> T:
    """Run a linear, of whose columns each rank has a part. Returns its result plus `residual`."""
    if spec.ranks == 1:
        return ops.linear(x, weight, bias=bias, residual=residual)
    return _collectives(ops).all_reduce(ops.linear(x, weight), weight, bias, residual)


def _collectives(ops: Ops[T]) -> Collectives[T]:
    return cast(Collectives[T], ops)  # a backend that is given a part of a model has them


def needs_8_bits(spec: DecoderSpec, weight: str) -> bool:
    """Return whether a weight keeps 8 bits when the model is quantized to 4 bits.

    True for the embedding, the head and the last layer, whose errors affect the logits directly.
    """
    return weight in ("embed", "head") or weight.startswith(f"layers.{spec.num_layers - 1}.")
