"""Linear layers in bfloat16. With x [N, K], weight [M, K], bias [M] or none, residual [N, M] or none:

    out[n, m] = sum over k of x[n, k] weight[m, k] + bias[m] + residual[n, m]

Each sum is float32 and takes k in one order, whatever N is: matrix instructions of 16 k each, in ascending order. With
S > 1 spans, K is cut into S equal spans, each is summed from zero, and the tree of tree.py adds them.

Tiles differ by N (configurations.py). A tile is `swapped` if the weight is the matrix instruction's left operand, whose
side has at least 64 rows on Hopper, so that a step of a few rows uses the same instruction as one of thousands.
"""

import torch
import triton
import triton.language as tl

from . import numbers
from .configurations import BLOCK_K, Tile, choose
from .tree import carry, tree_sum

_PART = 1024  # sums per warp that are added at a time to those that wait in memory: other registers are taken


@triton.jit
def place(tile, rows, outputs, BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, GROUP: tl.constexpr):
    """Return the first row and output of a tile. Tiles that run together share rows and weights in the L2 cache."""
    row_blocks, output_blocks = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(outputs, BLOCK_OUTPUTS)
    group = tile // (GROUP * output_blocks)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    within = tile % (GROUP * output_blocks)
    return (first + within % size) * BLOCK_ROWS, within // size * BLOCK_OUTPUTS


@triton.jit
def no_sums(row, weight_row, KIND: tl.constexpr, SWAPPED: tl.constexpr):
    """Return zeros [R, C], or [C, R] if SWAPPED."""
    if SWAPPED:
        return tl.zeros((weight_row.shape[0], row.shape[0]), KIND)
    else:
        return tl.zeros((row.shape[0], weight_row.shape[0]), KIND)


@triton.jit
def blocks_at(x, weight, row, weight_row, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return pointers to x[row, k] and weight[weight_row, k] of the BLOCK_K k from `start` on."""
    k = start + tl.arange(0, BLOCK_K)
    x_at = x + row.to(tl.int64)[:, None] * K + k[None, :]
    return x_at, weight + weight_row.to(tl.int64)[:, None] * K + k[None, :]


@triton.jit
def multiply_block(a, b, acc, SWAPPED: tl.constexpr):
    """Return acc + a bᵀ, or acc + b aᵀ if SWAPPED."""
    return multiply(b, tl.trans(a), acc) if SWAPPED else multiply(a, tl.trans(b), acc)


@triton.jit
def multiply(a, b, acc):
    """Return acc + a b: in float32 of bfloat16, or in int32 of int8, which is exact."""
    if a.dtype == tl.bfloat16:
        return numbers.dot(a, b, acc)
    elif numbers.INTERPRETING:
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.int32)
    else:
        return tl.dot(a, b, acc, out_dtype=tl.int32)


@triton.jit
def scaled(
    sums, x_scale, weight_scale, row, output, rows, outputs, span, SPANS: tl.constexpr, SWAPPED: tl.constexpr = False
):
    """Return the int32 sums of a span times x_scale[row, span] weight_scale[output, span], rounded as on the CPU.

    Args:
        sums: [R, C], or [C, R] if SWAPPED, as what is returned.
        x_scale, weight_scale: float32 [rows, SPANS] and [outputs, SPANS].
    """
    of_row = tl.load(x_scale + row * SPANS + span, mask=row < rows, other=0.0)
    of_output = tl.load(weight_scale + output * SPANS + span, mask=output < outputs, other=0.0)
    if SWAPPED:
        return sums.to(tl.float32) * (of_output[:, None] * of_row[None, :])
    else:
        return sums.to(tl.float32) * (of_output[None, :] * of_row[:, None])


@triton.jit
def product(
    x,
    weight,
    row,
    weight_row,
    rows,
    start,
    length,
    K: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """Return the sums over `start` <= k < `start` + LENGTH of x[row, k] weight[weight_row, k].

    Args:
        row: int32 [R]; those not below `rows` count as zeros.
        weight_row: int32 [C], all of them in the weight.
        length: LENGTH. If the compiler does not know it, it does not unroll the loop.

    Returns:
        [R, C], or [C, R] if SWAPPED: float32, or int32 of int8.
    """
    k = tl.arange(0, BLOCK_K)
    x_at, w_at = blocks_at(x, weight, row, weight_row, start, K, BLOCK_K)
    known = (row < rows)[:, None]
    acc = no_sums(row, weight_row, tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32, SWAPPED)
    for first in numbers.steps(0, length, BLOCK_K):
        if LENGTH % BLOCK_K == 0:
            a = tl.load(x_at, mask=known, other=0)
            b = tl.load(w_at)
        else:
            inside = (first + k < LENGTH)[None, :]
            a = tl.load(x_at, mask=known & inside, other=0)
            b = tl.load(w_at, mask=inside, other=0)
        acc = multiply_block(a, b, acc, SWAPPED)
        x_at += BLOCK_K
        w_at += BLOCK_K
    return acc


@triton.jit
def span_sum(
    x,
    x_scale,
    weight,
    weight_scale,
    row,
    output,
    rows,
    outputs,
    span,
    length,
    K: tl.constexpr,
    SPANS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """Return the `product` of one of the SPANS spans of K; of int8, `scaled` if there are scales.

    Args:
        row: as in `product`.
        output: int32 [C], rows of the weight; those not below `outputs` give sums that are not used.
        length: K / SPANS, as in `product`.
    """
    LENGTH: tl.constexpr = K // SPANS
    weight_row = tl.minimum(output, outputs - 1)
    sums = product(x, weight, row, weight_row, rows, span * LENGTH, length, K, LENGTH, BLOCK_K, SWAPPED)
    if x_scale is not None:
        sums = scaled(sums, x_scale, weight_scale, row, output, rows, outputs, span, SPANS, SWAPPED)
    return sums


@triton.jit
def spans_sum(
    x,
    x_scale,
    weight,
    weight_scale,
    row,
    output,
    rows,
    outputs,
    first,
    length,
    K: tl.constexpr,
    SPANS: tl.constexpr,
    SPANS_HERE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """Return the tree's sum of `span_sum` over SPANS_HERE of the SPANS spans of K, in registers."""
    if SPANS_HERE == 1:
        LENGTH: tl.constexpr = K // SPANS
        return span_sum(
            x, x_scale, weight, weight_scale, row, output, rows, outputs, first, LENGTH, K, SPANS, BLOCK_K, SWAPPED
        )
    else:
        pending0 = no_sums(row, output, tl.float32, SWAPPED)
        pending1, pending2 = pending0, pending0
        for s in range(SPANS_HERE):
            part = span_sum(
                x,
                x_scale,
                weight,
                weight_scale,
                row,
                output,
                rows,
                outputs,
                first + s,
                length,
                K,
                SPANS,
                BLOCK_K,
                SWAPPED,
            )
            pending0, pending1, pending2 = carry(part, s, pending0, pending1, pending2, SPANS_HERE)
        return pending0


@triton.jit
def spans_sum_in_one_loop(
    x,
    x_scale,
    weight,
    weight_scale,
    row,
    output,
    rows,
    outputs,
    first,
    length,
    K: tl.constexpr,
    SPANS: tl.constexpr,
    SPANS_HERE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """Do as spans_sum with SPANS_HERE > 1, in one loop over all blocks of k, whose loads don't pause between spans."""
    LENGTH: tl.constexpr = K // SPANS
    BLOCKS: tl.constexpr = LENGTH // BLOCK_K
    x_at, w_at = blocks_at(x, weight, row, tl.minimum(output, outputs - 1), first * LENGTH, K, BLOCK_K)
    known = (row < rows)[:, None]
    zeros = no_sums(row, output, tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32, SWAPPED)
    pending0 = no_sums(row, output, tl.float32, SWAPPED)
    acc, pending1, pending2 = zeros, pending0, pending0
    for i in numbers.steps(0, length * SPANS_HERE // BLOCK_K):
        a = tl.load(x_at, mask=known, other=0)
        b = tl.load(w_at)
        acc = multiply_block(a, b, acc, SWAPPED)
        x_at += BLOCK_K
        w_at += BLOCK_K
        if i % BLOCKS == BLOCKS - 1:
            s = i // BLOCKS
            part = acc
            if x_scale is not None:
                part = scaled(acc, x_scale, weight_scale, row, output, rows, outputs, first + s, SPANS, SWAPPED)
            pending0, pending1, pending2 = carry(part, s, pending0, pending1, pending2, SPANS_HERE)
            acc = zeros
    return pending0


@triton.jit
def store(values, out, bias, residual, row, output, rows, outputs):
    """out[row, output] = values + bias[output] + residual[row, output], rounded to the type of `out`.

    Args:
        values: float32 [R, C].
        bias: [outputs] or None.
        residual: float32 [rows, outputs] or None; may be `out`.
    """
    known = (row < rows)[:, None] & (output < outputs)[None, :]
    at = row.to(tl.int64)[:, None] * outputs + output[None, :]
    if bias is not None:
        values += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        values += tl.load(residual + at, mask=known, other=0.0)
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(out + at, numbers.to_bfloat16(values), mask=known)
    else:
        tl.store(out + at, values, mask=known)


@triton.jit(do_not_specialize=["rows", "length"])
def linear_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    bias,
    residual,
    rows,
    outputs,
    length,
    K: tl.constexpr,
    SPANS: tl.constexpr,
    SPANS_HERE: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """out[n, m] = x[n, :] . weight[m, :] + bias[m] + residual[n, m] of one tile: program (tile, 0).

    With SPANS_HERE < SPANS, program (tile, g) writes the sum of spans g * SPANS_HERE on to out[g, n, m], float32, and
    there are no bias and no residual. Of int8, the sums of span s are multiplied by x_scale[n, s] weight_scale[m, s];
    without scales and with SPANS_HERE = 1, they are written as int32.
    """
    first_row, first_output = place(tl.program_id(0), rows, outputs, BLOCK_ROWS, BLOCK_OUTPUTS, GROUP)
    row, output = first_row + tl.arange(0, BLOCK_ROWS), first_output + tl.arange(0, BLOCK_OUTPUTS)
    group = tl.program_id(1)
    first = group * SPANS_HERE
    if ONE_LOOP:
        total = spans_sum_in_one_loop(
            x, x_scale, weight, weight_scale, row, output, rows, outputs, first, length, K, SPANS, SPANS_HERE, BLOCK_K,
            SWAPPED,
        )  # fmt: skip
    else:
        total = spans_sum(
            x, x_scale, weight, weight_scale, row, output, rows, outputs, first, length, K, SPANS, SPANS_HERE, BLOCK_K,
            SWAPPED,
        )  # fmt: skip
    if SWAPPED:
        total = tl.trans(total)
    if SPANS_HERE < SPANS:
        out += group.to(tl.int64) * rows * outputs
    store(total, out, bias, residual, row, output, rows, outputs)


@triton.jit
def held_sum(
    x,
    x_scale,
    weight,
    weight_scale,
    row,
    output,
    rows,
    outputs,
    first,
    length,
    K: tl.constexpr,
    SPANS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """Return the tree's sum of `span_sum` over COUNT spans, a power of two, from `first` on."""
    if COUNT == 1:
        return span_sum(
            x, x_scale, weight, weight_scale, row, output, rows, outputs, first, length, K, SPANS, BLOCK_K, SWAPPED
        )
    else:
        HALF: tl.constexpr = COUNT // 2
        left = held_sum(
            x,
            x_scale,
            weight,
            weight_scale,
            row,
            output,
            rows,
            outputs,
            first,
            length,
            K,
            SPANS,
            HALF,
            BLOCK_K,
            SWAPPED,
        )
        first += HALF
        return left + held_sum(
            x,
            x_scale,
            weight,
            weight_scale,
            row,
            output,
            rows,
            outputs,
            first,
            length,
            K,
            SPANS,
            HALF,
            BLOCK_K,
            SWAPPED,
        )


@triton.jit
def halves(acc):
    """Return the left and the right half of acc [A, B]: [A, B / 2] each."""
    A: tl.constexpr = acc.shape[0]
    B: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(acc, (A, 2, B // 2)), (0, 2, 1)))


@triton.jit
def fold(acc, s, waiting, SIZE: tl.constexpr, PART: tl.constexpr):
    """Do as tree.carry for a span that is not the last, with the sums that wait in memory.

    Args:
        acc: The sums of span s, float32 [A, B].
        waiting: Where the sums that wait are; level i is at `waiting + i * SIZE`.
        PART: Sums that are added at a time.
    """
    A: tl.constexpr = acc.shape[0]
    B: tl.constexpr = acc.shape[1]
    if A * B > PART:
        left, right = halves(acc)
        fold(left, s, waiting, SIZE, PART)
        fold(right, s, waiting + A * B // 2, SIZE, PART)
    else:
        tl.debug_barrier()  # another thread may have written what this one reads
        at = waiting + (tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :])
        for level in tl.static_range(2):  # masked, not in branches: those would move the sums between threads
            waits = s & (2 << level) - 1 == (2 << level) - 1
            acc = tl.where(waits, tl.load(at + level * SIZE, mask=waits, other=0.0) + acc, acc)
        level = tl.where(s & 1 == 0, 0, tl.where(s & 3 == 1, 1, 2))
        tl.store(at + level * SIZE, acc)


@triton.jit
def fold_last(
    acc,
    waiting,
    out,
    bias,
    residual,
    first_row,
    first_output,
    rows,
    outputs,
    SPANS: tl.constexpr,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """Add the sums that wait to those of the last span, and `store` a tile that begins at (first_row, first_output)."""
    A: tl.constexpr = acc.shape[0]
    B: tl.constexpr = acc.shape[1]
    if A * B > PART:
        left, right = halves(acc)
        fold_last(
            left, waiting, out, bias, residual, first_row, first_output, rows, outputs, SPANS, SIZE, PART, SWAPPED
        )
        second_row = first_row + (B // 2 if SWAPPED else 0)
        second_output = first_output + (0 if SWAPPED else B // 2)
        waiting += A * B // 2
        fold_last(
            right, waiting, out, bias, residual, second_row, second_output, rows, outputs, SPANS, SIZE, PART, SWAPPED
        )
    else:
        tl.debug_barrier()
        at = waiting + (tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :])
        for level in tl.static_range(3):
            if 1 << level < SPANS:
                acc = tl.load(at + level * SIZE) + acc
        if SWAPPED:
            row, output = first_row + tl.arange(0, B), first_output + tl.arange(0, A)
            store(tl.trans(acc), out, bias, residual, row, output, rows, outputs)
        else:
            row, output = first_row + tl.arange(0, A), first_output + tl.arange(0, B)
            store(acc, out, bias, residual, row, output, rows, outputs)


@triton.jit(do_not_specialize=["rows", "length"])
def large_spanned_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    bias,
    residual,
    waiting,
    rows,
    outputs,
    length,
    K: tl.constexpr,
    SPANS: tl.constexpr,
    SPANS_HELD: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """Do as linear_kernel with SPANS > 1, for tiles whose waiting sums don't fit in registers.

    Program p computes tiles p, p + programs and so on. Its waiting sums are in waiting[p], float32 [3, tile],
    apart from those of SPANS_HELD spans, a power of two that divides SPANS, which are in registers.
    """
    COUNT: tl.constexpr = SPANS // SPANS_HELD
    SIZE: tl.constexpr = BLOCK_ROWS * BLOCK_OUTPUTS
    waiting += tl.program_id(0).to(tl.int64) * 3 * SIZE
    tile, tiles = tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS) * tl.cdiv(outputs, BLOCK_OUTPUTS)
    while tile < tiles:
        first_row, first_output = place(tile, rows, outputs, BLOCK_ROWS, BLOCK_OUTPUTS, GROUP)
        row, output = first_row + tl.arange(0, BLOCK_ROWS), first_output + tl.arange(0, BLOCK_OUTPUTS)
        for s in range(COUNT - 1):
            first = s * SPANS_HELD
            acc = held_sum(
                x, x_scale, weight, weight_scale, row, output, rows, outputs, first, length, K, SPANS, SPANS_HELD,
                BLOCK_K, SWAPPED,
            )  # fmt: skip
            fold(acc, s, waiting, SIZE, PART)
        first = SPANS - SPANS_HELD
        acc = held_sum(
            x, x_scale, weight, weight_scale, row, output, rows, outputs, first, length, K, SPANS, SPANS_HELD, BLOCK_K,
            SWAPPED,
        )  # fmt: skip
        fold_last(acc, waiting, out, bias, residual, first_row, first_output, rows, outputs, COUNT, SIZE, PART, SWAPPED)
        tile += tl.num_programs(0)


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    partials, x_scale, weight_scale, out, bias, residual, rows, outputs, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """out[n, m] = tree over g of partials[g, n, m] + bias[m] + residual[n, m]. Program (block of m, n).

    Partial sums in int32, of parts of a single span, are then `scaled`.
    """
    row = tl.program_id(1) + tl.arange(0, 1)
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = (row < rows)[:, None] & (output < outputs)[None, :]
    at = row.to(tl.int64)[:, None] * outputs + output[None, :]
    total = tree_sum(partials + at, rows.to(tl.int64) * outputs, known, COUNT)
    if x_scale is not None:
        total = scaled(total, x_scale, weight_scale, row, output, rows, outputs, 0, 1)
    store(total, out, bias, residual, row, output, rows, outputs)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    spans: int = 1,
    rows: int | None = None,
    tile: Tile | None = None,
) -> None:
    """Compute out = x weightᵀ + bias + residual (see the module).

    Args:
        x: bfloat16 [N, K], contiguous, as all of these.
        weight: bfloat16 [M, K].
        out: bfloat16 or float32 [N, M].
        bias: bfloat16 or float32 [M].
        residual: float32 [N, M]; may be `out`.
        spans: K is summed in this many equal spans (tree.py): 1, 2, 4 or 8.
        rows: Compute only this many rows, the first ones; None: all.
        tile: How to compute it; None: as configurations.py says.
    """
    rows = len(x) if rows is None else rows
    outputs, inputs = weight.shape
    tile = tile or choose("linear", outputs, inputs, spans, rows)
    partials = partial_sums(x, weight, spans, rows, tile)
    if partials is not None:
        merge(partials, out, bias, residual)
    elif rows:
        launch(x, None, weight, None, out, bias, residual, spans, rows, tile)


def partial_sums(
    x: torch.Tensor, weight: torch.Tensor, spans: int, rows: int | None = None, tile: Tile | None = None
) -> torch.Tensor | None:
    """Return the sums that `merge` or `norm` still has to add, float32 [G, N, M], or None if `linear` leaves none."""
    rows = len(x) if rows is None else rows
    outputs, inputs = weight.shape
    tile = tile or choose("linear", outputs, inputs, spans, rows)
    if tile.waits_in_memory or tile.spans_here(spans) == spans or rows == 0:
        return None
    partials = x.new_empty((spans // tile.spans_here(spans), rows, outputs), dtype=torch.float32)
    launch(x, None, weight, None, partials, None, None, spans, rows, tile)
    return partials


def merge(partials: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> None:
    """Compute out[n, m] = tree over g of partials[g, n, m] + bias[m] + residual[n, m]."""
    count, rows, outputs = partials.shape
    block = 1024
    grid = (triton.cdiv(outputs, block), rows)
    merge_kernel[grid](
        partials, None, None, out, bias, residual, rows, outputs, count, block, num_warps=4, enable_fp_fusion=False
    )


def launch(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    spans: int,
    rows: int,
    tile: Tile,
    block_k: int = BLOCK_K,
) -> None:
    """Launch the kernel of a tile for the first `rows` rows, at least one."""
    outputs, inputs = weight.shape
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    operands = (x, x_scale, weight, weight_scale, out, bias, residual)
    constants = tile.constants | {"K": inputs, "SPANS": spans, "BLOCK_K": block_k}
    if tile.waits_in_memory:
        programs = min(tiles, tile.programs)
        waiting = x.new_empty((programs, 3, tile.rows * tile.outputs), dtype=torch.float32)
        large_spanned_kernel[(programs,)](
            *operands,
            waiting,
            rows,
            outputs,
            inputs // spans,
            SPANS_HELD=tile.held,
            PART=_PART * tile.warps,
            **constants,
            **tile.options,
        )
    else:
        here = tile.spans_here(spans)
        linear_kernel[(tiles, spans // here)](
            *operands,
            rows,
            outputs,
            inputs // spans,
            SPANS_HERE=here,
            ONE_LOOP=tile.one_loop and inputs // spans % block_k == 0,
            **constants,
            **tile.options,
        )
