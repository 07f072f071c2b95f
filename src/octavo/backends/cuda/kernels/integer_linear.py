"""Linear layers of rotated int8 rows (rotation.py). With x[n, k] = s[n, span] p[n, k] and
weight[m, k] = t[m, span] q[m, k]:

    out[n, m] = tree over spans of (sum over k in the span of p[n, k] q[m, k]) * (t[m, span] s[n, span])
                + bias[m] + residual[n, m]

A span's sum is exact, and the tree of tree.py adds spans in float32. So any tile and any division of the spans between
programs gives the same bits; where there is one span, so does any division of its k. The kernels are those of linear.py
and gated.py.
"""

from typing import Literal

import torch
import triton

from .configurations import Tile, choose
from .gated import launch as launch_gated
from .linear import launch, merge, merge_kernel
from .rotation import Int8Rows

BLOCK_K = 128  # as many bytes as of bfloat16


def integer_linear(
    x: Int8Rows,
    weight: Int8Rows,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Compute a linear layer (see the module).

    Args:
        x: N rows of K, in as many spans as the weight.
        weight: M rows of K.
        out: bfloat16 or float32 [N, M].
        bias: bfloat16 or float32 [M].
        residual: float32 [N, M]; may be `out`.
        tile: How to compute it; None: as configurations.py says.
    """
    rows = len(x.values)
    if rows == 0:
        return
    tile = tile or _tile(x, weight)
    partials = partial_sums(x, weight, tile)
    if partials is not None:
        merge(partials, out, bias, residual)
    elif tile.groups == 1:
        launch(x.values, x.scales, weight.values, weight.scales, out, bias, residual, weight.spans, rows, tile, BLOCK_K)
    else:
        _divide_span(x, weight, out, bias, residual, tile)


def partial_sums(x: Int8Rows, weight: Int8Rows, tile: Tile | None = None) -> torch.Tensor | None:
    """Do as linear.partial_sums: return sums of spans that are still to be added, float32 [G, N, M], or None."""
    rows, outputs = len(x.values), len(weight.values)
    if rows == 0 or weight.spans == 1:
        return None
    tile = tile or _tile(x, weight)
    if tile.groups == 1:
        return None
    sums = x.scales.new_empty((tile.groups, rows, outputs))
    launch(x.values, x.scales, weight.values, weight.scales, sums, None, None, weight.spans, rows, tile, BLOCK_K)
    return sums


def _divide_span(
    x: Int8Rows,
    weight: Int8Rows,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    tile: Tile,
) -> None:
    """Compute a layer of one span, whose k is divided between tile.groups programs."""
    rows, outputs, groups = len(x.values), len(weight.values), tile.groups
    sums = out.new_empty((groups, rows, outputs), dtype=torch.int32)
    launch(x.values, None, weight.values, None, sums, None, None, groups, rows, tile, BLOCK_K)
    block = 1024
    merge_kernel[(triton.cdiv(outputs, block), rows)](
        sums, x.scales, weight.scales, out, bias, residual, rows, outputs, groups, block,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _tile(x: Int8Rows, weight: Int8Rows) -> Tile:
    outputs, inputs = weight.values.shape
    return choose("int8", outputs, inputs, weight.spans, len(x.values))


def integer_gated(
    x: Int8Rows,
    weight: Int8Rows,
    out: torch.Tensor,
    activation: Literal["silu", "gelu_tanh"],
    bias: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Compute the gate and up projections and their activation, as `gated` does.

    Args:
        x: N rows of K.
        weight: 2 F rows of K, the gate's first.
        out: bfloat16 [N, F].
        bias: bfloat16 or float32 [2 F].
        tile: How to compute it; None: as configurations.py says.
    """
    rows = len(x.values)
    if rows:
        outputs, inputs = weight.values.shape
        tile = tile or choose("int8 gated", outputs, inputs, 1, rows)
        launch_gated(x.values, x.scales, weight.values, weight.scales, out, activation, bias, rows, tile, BLOCK_K)
