"""The gate and up projections with their activation. With x [N, K], weight [2 F, K] (gate over up), bias [2 F] or none:

    out[n, f] = activation(x[n] . weight[f] + bias[f]) * (x[n] . weight[F + f] + bias[F + f])        bfloat16 [N, F]

A tile takes eight rows of the gate, the same eight of up, the next eight of the gate and so on, so that one accumulator
has both, and the two factors of an output are in the same thread. The sums are those of linear.py.
"""

from typing import Literal

import torch
import triton
import triton.language as tl

from . import numbers
from .configurations import BLOCK_K, Tile, choose
from .linear import place, span_sum


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return silu(x) = x sigmoid(x), or gelu_tanh(x) = x sigmoid(2 u) (Hendrycks and Gimpel, 2016)."""
    if ACTIVATION == "silu":
        return x * sigmoid(x)
    else:
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * sigmoid(u + u)


@triton.jit
def gate_and_up(acc, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Return the gate's and up's rows of acc [COLUMNS, ROWS]: [COLUMNS / 2, ROWS] each."""
    eights = tl.permute(tl.reshape(acc, (COLUMNS // 16, 2, 8, ROWS)), (0, 2, 3, 1))
    gate, up = tl.split(eights)
    return tl.reshape(gate, (COLUMNS // 2, ROWS)), tl.reshape(up, (COLUMNS // 2, ROWS))


@triton.jit
def gate_and_up_rows(first_feature, features, BLOCK_OUTPUTS: tl.constexpr):
    """Return the rows of the weight in a tile (see the module), int32 [BLOCK_OUTPUTS]."""
    i = tl.arange(0, BLOCK_OUTPUTS)
    of_tile = tl.minimum(first_feature + i // 16 * 8 + i % 8, features - 1)
    return of_tile + i // 8 % 2 * features


@triton.jit(do_not_specialize=["rows"])
def gated_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    bias,
    rows,
    features,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """out[n, f] = activation(gate[n, f]) * up[n, f] of one tile: BLOCK_ROWS rows, BLOCK_OUTPUTS / 2 features."""
    BLOCK: tl.constexpr = BLOCK_OUTPUTS // 2
    first_row, first_feature = place(tl.program_id(0), rows, features, BLOCK_ROWS, BLOCK, GROUP)
    row, feature = first_row + tl.arange(0, BLOCK_ROWS), first_feature + tl.arange(0, BLOCK)
    weight_row = gate_and_up_rows(first_feature, features, BLOCK_OUTPUTS)
    acc = span_sum(x, x_scale, weight, weight_scale, row, weight_row, rows, 2 * features, 0, K, K, 1, BLOCK_K, SWAPPED)
    if not SWAPPED:
        acc = tl.trans(acc)
    gate, up = gate_and_up(acc, BLOCK_OUTPUTS, BLOCK_ROWS)
    store_activated(gate, up, out, bias, row, feature, rows, features, ACTIVATION)


@triton.jit
def store_activated(gate, up, out, bias, row, feature, rows, features, ACTIVATION: tl.constexpr):
    """out[row, feature] = activation(gate + bias[feature]) * (up + bias[features + feature]).

    Args:
        gate, up: float32 [F, R].
        bias: [2 * features] or None.
    """
    if bias is not None:
        gate += tl.load(bias + feature, mask=feature < features, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias + features + feature, mask=feature < features, other=0.0).to(tl.float32)[:, None]
    values = tl.trans(numbers.to_bfloat16(activate(gate, ACTIVATION) * up))
    known = (row < rows)[:, None] & (feature < features)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * features + feature[None, :], values, mask=known)


def gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    activation: Literal["silu", "gelu_tanh"],
    bias: torch.Tensor | None = None,
    rows: int | None = None,
    tile: Tile | None = None,
) -> None:
    """Compute the gate and up projections and their activation (see the module).

    Args:
        x: bfloat16 [N, K], contiguous, as all of these.
        weight: bfloat16 [2 F, K], the gate's rows first.
        out: bfloat16 [N, F].
        bias: bfloat16 or float32 [2 F].
        rows: Compute only this many rows, the first ones; None: all.
        tile: How to compute it; None: as configurations.py says.
    """
    rows = len(x) if rows is None else rows
    if rows:
        outputs, inputs = weight.shape
        tile = tile or choose("gated", outputs, inputs, 1, rows)
        launch(x, None, weight, None, out, activation, bias, rows, tile)


def launch(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    out: torch.Tensor,
    activation: Literal["silu", "gelu_tanh"],
    bias: torch.Tensor | None,
    rows: int,
    tile: Tile,
    block_k: int = BLOCK_K,
) -> None:
    """Launch gated_kernel for the first `rows` rows, at least one."""
    outputs, inputs = weight.shape
    gated_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs),)](
        x,
        x_scale,
        weight,
        weight_scale,
        out,
        bias,
        rows,
        outputs // 2,
        K=inputs,
        ACTIVATION=activation,
        **tile.constants | {"BLOCK_K": block_k},
        **tile.options,
    )
