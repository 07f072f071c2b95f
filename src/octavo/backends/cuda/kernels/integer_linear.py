"""Linear layers of rotated int8 rows (rotation.py): x[n, k] = s[n] p[n, k], weight[m, k] = t[m] q[m, k].

    out[n, m] = (sum over k of p[n, k] q[m, k]) * (t[m] s[n]) + bias[m] + residual[n, m]

The sums are exact, so any tile and any division of k between programs gives the same bits. The kernels are those of
linear.py and gated.py.
"""

from typing import Literal

import torch
import triton

from .configurations import Tile, choose
from .gated import launch as launch_gated
from .linear import linear_kernel, merge_kernel
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
        x: N rows of K.
        weight: M rows of K.
        out: bfloat16 or float32 [N, M].
        bias: bfloat16 or float32 [M].
        residual: float32 [N, M]; may be `out`.
        tile: How to compute it; None: as configurations.py says.
    """
    rows, inputs = x.values.shape
    outputs = len(weight.values)
    if rows == 0:
        return
    tile = tile or choose("int8", outputs, inputs, 1, rows)
    groups = tile.groups
    alone = groups == 1
    into = out if alone else out.new_empty((groups, rows, outputs), dtype=torch.int32)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs), groups)
    linear_kernel[grid](
        x.values,
        x.scales if alone else None,
        weight.values,
        weight.scales if alone else None,
        into,
        bias if alone else None,
        residual if alone else None,
        rows,
        outputs,
        inputs // groups,
        K=inputs,
        SPANS=groups,
        SPANS_HERE=1,
        ONE_LOOP=False,
        **tile.constants | {"BLOCK_K": BLOCK_K},
        **tile.options,
    )
    if not alone:
        block = 1024
        merge_kernel[(triton.cdiv(outputs, block), rows)](
            into, x.scales, weight.scales, out, bias, residual, rows, outputs, groups, block,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


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
