"""Linear layers of bfloat16 rows and a matrix of 4-bit integers (four_bits.py).

What is computed, in which order, is that of linear.py and gated.py for the matrix in bfloat16, and so are the bits.
A step of many rows unpacks the matrix once, into memory, and is computed by those kernels.
"""

from typing import Literal

import torch
import triton
import triton.language as tl

from . import gated as plain_gated
from . import linear as plain_linear
from . import numbers
from .configurations import BLOCK_K, Tile, choose
from .four_bits import FourBits, unpacked
from .gated import gate_and_up, gate_and_up_rows, store_activated
from .linear import merge, multiply_block, no_sums, place, store
from .tree import carry

MOST_ROWS = 512  # beyond, the matrix is unpacked into memory
_UNPACKED = 32  # rows of the matrix that a program unpacks


@triton.jit
def span_sum(
    x, values, pairs, row, weight_row, rows, first_block, blocks, outputs,
    K: tl.constexpr, GROUP: tl.constexpr, MIXED: tl.constexpr, BLOCK_K: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Return the sums of x[row, k] weight[weight_row, k] over `blocks` blocks of BLOCK_K k: as linear.product does."""
    k = tl.arange(0, BLOCK_K)
    x_at = x + row.to(tl.int64)[:, None] * K + (first_block * BLOCK_K + k)[None, :]
    known = (row < rows)[:, None]
    acc = no_sums(row, weight_row, tl.float32, SWAPPED)
    for i in numbers.steps(0, blocks):
        a = tl.load(x_at, mask=known, other=0)
        b = unpacked(values, pairs, weight_row, first_block + i, outputs, K, GROUP, MIXED, BLOCK_K)
        acc = multiply_block(a, b, acc, SWAPPED)
        x_at += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["rows", "blocks"])
def four_bit_linear_kernel(
    x, values, pairs, out, bias, residual, rows, outputs, blocks,
    K: tl.constexpr, SPANS: tl.constexpr, SPANS_HERE: tl.constexpr, GROUP_OF_K: tl.constexpr, MIXED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SWAPPED: tl.constexpr,
):  # fmt: skip
    """Do as linear.linear_kernel. A span has `blocks` blocks of BLOCK_K k."""
    first_row, first_output = place(tl.program_id(0), rows, outputs, BLOCK_ROWS, BLOCK_OUTPUTS, GROUP)
    row, output = first_row + tl.arange(0, BLOCK_ROWS), first_output + tl.arange(0, BLOCK_OUTPUTS)
    weight_row = tl.minimum(output, outputs - 1)
    group = tl.program_id(1)
    SPAN_BLOCKS: tl.constexpr = K // SPANS // BLOCK_K
    first_block = group * (SPANS_HERE * SPAN_BLOCKS)
    if SPANS_HERE == 1:
        total = span_sum(
            x, values, pairs, row, weight_row, rows, first_block, blocks, outputs, K, GROUP_OF_K, MIXED, BLOCK_K,
            SWAPPED,
        )  # fmt: skip
    else:
        total = no_sums(row, weight_row, tl.float32, SWAPPED)
        pending1, pending2 = total, total
        for s in range(SPANS_HERE):
            part = span_sum(
                x, values, pairs, row, weight_row, rows, first_block + s * SPAN_BLOCKS, blocks, outputs, K,
                GROUP_OF_K, MIXED, BLOCK_K, SWAPPED,
            )  # fmt: skip
            total, pending1, pending2 = carry(part, s, total, pending1, pending2, SPANS_HERE)
    if SWAPPED:
        total = tl.trans(total)
    if SPANS_HERE < SPANS:
        out += group.to(tl.int64) * rows * outputs
    store(total, out, bias, residual, row, output, rows, outputs)


@triton.jit(do_not_specialize=["rows", "blocks"])
def four_bit_gated_kernel(
    x, values, pairs, out, bias, rows, features, blocks,
    K: tl.constexpr, ACTIVATION: tl.constexpr, GROUP_OF_K: tl.constexpr, MIXED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SWAPPED: tl.constexpr,
):  # fmt: skip
    """Do as gated.gated_kernel. A row has `blocks` blocks of BLOCK_K k."""
    BLOCK: tl.constexpr = BLOCK_OUTPUTS // 2
    first_row, first_feature = place(tl.program_id(0), rows, features, BLOCK_ROWS, BLOCK, GROUP)
    row, feature = first_row + tl.arange(0, BLOCK_ROWS), first_feature + tl.arange(0, BLOCK)
    weight_row = gate_and_up_rows(first_feature, features, BLOCK_OUTPUTS)
    acc = span_sum(
        x, values, pairs, row, weight_row, rows, 0, blocks, 2 * features, K, GROUP_OF_K, MIXED, BLOCK_K, SWAPPED
    )
    if not SWAPPED:
        acc = tl.trans(acc)
    gate, up = gate_and_up(acc, BLOCK_OUTPUTS, BLOCK_ROWS)
    store_activated(gate, up, out, bias, row, feature, rows, features, ACTIVATION)


@triton.jit
def unpack_kernel(
    values, pairs, out, outputs,
    K: tl.constexpr, GROUP_OF_K: tl.constexpr, MIXED: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[row, k] = weight[row, k] of ROWS rows and BLOCK_K k: program (block of rows, block of k)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weight_row, block = tl.minimum(row, outputs - 1), tl.program_id(1)
    weight = unpacked(values, pairs, weight_row, block, outputs, K, GROUP_OF_K, MIXED, BLOCK_K)
    at = row.to(tl.int64)[:, None] * K + (block * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    tl.store(out + at, weight, mask=(row < outputs)[:, None])


def unpack(weight: FourBits) -> torch.Tensor:
    """Return the matrix in bfloat16, in new memory."""
    rows, columns = weight.shape
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=weight.values.device)
    unpack_kernel[(triton.cdiv(rows, _UNPACKED), columns // BLOCK_K)](
        weight.values, weight.pairs, out, rows, columns, weight.group, weight.mixed, _UNPACKED, BLOCK_K, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def linear(
    x: torch.Tensor,
    weight: FourBits,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    spans: int = 1,
    tile: Tile | None = None,
) -> None:
    """Compute out = x weightᵀ + bias + residual.

    Args:
        x: bfloat16 [N, K], contiguous, as all of these.
        weight: [M, K].
        out: bfloat16 or float32 [N, M].
        bias: bfloat16 or float32 [M].
        residual: float32 [N, M]; may be `out`.
        spans: K is summed in this many spans of equally many blocks of 64 (tree.py): 1, 2, 4 or 8.
        tile: How to compute it; None: as configurations.py says.
    """
    if len(x) > MOST_ROWS:
        plain_linear.linear(x, unpack(weight), out, bias, residual, spans)
        return
    partials = partial_sums(x, weight, spans, tile)
    if partials is not None:
        merge(partials, out, bias, residual)
    elif len(x):
        _launch(x, weight, out, bias, residual, spans, tile or _tile(x, weight, spans))


def partial_sums(x: torch.Tensor, weight: FourBits, spans: int, tile: Tile | None = None) -> torch.Tensor | None:
    """Return the sums that `merge` or `norm` still has to add, float32 [G, N, M], or None if `linear` leaves none."""
    rows, tile = len(x), tile or _tile(x, weight, spans)
    if rows == 0 or rows > MOST_ROWS or tile.spans_here(spans) == spans:
        return None
    partials = x.new_empty((spans // tile.spans_here(spans), rows, weight.shape[0]), dtype=torch.float32)
    _launch(x, weight, partials, None, None, spans, tile)
    return partials


def gated(
    x: torch.Tensor,
    weight: FourBits,
    out: torch.Tensor,
    activation: Literal["silu", "gelu_tanh"],
    bias: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Compute the gate and up projections and their activation, as gated.gated does.

    Args:
        x: bfloat16 [N, K], contiguous, as `out`.
        weight: [2 F, K], the gate's rows first.
        out: bfloat16 [N, F].
        bias: bfloat16 or float32 [2 F].
        tile: How to compute it; None: as configurations.py says.
    """
    (outputs, inputs), rows = weight.shape, len(x)
    if rows > MOST_ROWS:
        plain_gated.gated(x, unpack(weight), out, activation, bias)
    elif rows:
        tile = tile or choose("4 bits gated", outputs, inputs, 1, rows)
        four_bit_gated_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs),)](
            x, weight.values, weight.pairs, out, bias, rows, outputs // 2, inputs // BLOCK_K,
            K=inputs, ACTIVATION=activation, GROUP_OF_K=weight.group, MIXED=weight.mixed,
            **tile.constants, **tile.options,
        )  # fmt: skip


def _tile(x: torch.Tensor, weight: FourBits, spans: int) -> Tile:
    return choose("4 bits", *weight.shape, spans, min(max(len(x), 1), MOST_ROWS))


def _launch(
    x: torch.Tensor,
    weight: FourBits,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    spans: int,
    tile: Tile,
) -> None:
    outputs, inputs = weight.shape
    here = tile.spans_here(spans)
    grid = (triton.cdiv(len(x), tile.rows) * triton.cdiv(outputs, tile.outputs), spans // here)
    four_bit_linear_kernel[grid](
        x, weight.values, weight.pairs, out, bias, residual, len(x), outputs, inputs // spans // BLOCK_K,
        K=inputs, SPANS=spans, SPANS_HERE=here, GROUP_OF_K=weight.group, MIXED=weight.mixed,
        **tile.constants, **tile.options,
    )  # fmt: skip
