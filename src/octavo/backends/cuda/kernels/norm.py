"""RMS norm (Zhang and Sennrich, 2019), and the residual stream before it. With x [N, H] float32, weight [H]:

    out[n] = x[n] / sqrt(mean(x[n]²) + eps) * weight                          bfloat16

One program computes one row, so its sums do not depend on the others. `add_norm` and `add_norm_int8` first add the sums
that a linear with spans has left (`partial_sums`), which saves the kernel that would merge them.
"""

import torch
import triton
import triton.language as tl

from . import numbers
from .rotation import Int8Rows, largest_power, new_int8_rows, quantize_row
from .rotation import warps as rotation_warps
from .tree import tree_sum


@triton.jit
def normalized(x, weight, column, H: tl.constexpr, eps):
    """Return x / sqrt(mean(x²) + eps) * weight, float32 [1, BLOCK], where x is zero from column H on."""
    mean = tl.sum(x * x, axis=1, keep_dims=True) / H
    scale = 1.0 / tl.sqrt_rn(mean + eps)
    return x * scale * tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)[None, :]


@triton.jit
def norm_kernel(x, weight, out, row_of, eps, H: tl.constexpr, BLOCK: tl.constexpr):
    """out[n] = norm(x[row_of[n]]), or of x[n] if `row_of` is None. Program n."""
    n = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    source = tl.load(row_of + n).to(tl.int64) if row_of is not None else n.to(tl.int64)
    values = tl.load(x + source * H + column[None, :], mask=(column < H)[None, :], other=0.0)
    values = numbers.to_bfloat16(normalized(values, weight, column, H, eps))
    tl.store(out + n.to(tl.int64) * H + column[None, :], values, mask=(column < H)[None, :])


@triton.jit
def added(partials, x, bias, n, column, rows, H: tl.constexpr, COUNT: tl.constexpr):
    """Add the tree over g of partials[g, n] + bias to x[n], in memory too, and return it, float32 [1, BLOCK]."""
    known = (column < H)[None, :]
    at = n * H + column[None, :]
    values = tree_sum(partials + at, rows.to(tl.int64) * H, known, COUNT)
    if bias is not None:
        values += tl.load(bias + column, mask=column < H, other=0.0).to(tl.float32)[None, :]
    values += tl.load(x + at, mask=known, other=0.0)
    tl.store(x + at, values, mask=known)
    return values


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    partials, x, bias, weight, out, rows, eps, H: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """x[n] += tree over g of partials[g, n] + bias; out[n] = norm(x[n]). Program n."""
    n = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = added(partials, x, bias, n, column, rows, H, COUNT)
    normed = numbers.to_bfloat16(normalized(values, weight, column, H, eps))
    tl.store(out + n * H + column[None, :], normed, mask=(column < H)[None, :])


@triton.jit(do_not_specialize=["rows"])
def norm_int8_kernel(
    partials,
    x,
    bias,
    weight,
    values,
    scales,
    row_of,
    normed,
    scratch,
    rows,
    eps,
    H: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    """values[n], scales[n] = the int8 form (rotation.py) of norm(x[row_of[n]]), or of x[n]. Program n.

    If there are `partials`, first x[n] += tree over the COUNT g of partials[g, n] + bias; there is no `row_of` then.
    `normed`, float32 [N, H], takes the row from one form of sharing it between threads to the other.
    """
    n = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    known = (column < H)[None, :]
    if partials is not None:
        row = added(partials, x, bias, n, column, rows, H, COUNT)
    else:
        source = tl.load(row_of + n).to(tl.int64) if row_of is not None else n
        row = tl.load(x + source * H + column[None, :], mask=known, other=0.0)
    tl.store(normed + n * H + column[None, :], normalized(row, weight, column, H, eps), mask=known)
    tl.debug_barrier()
    quantize_row(normed, values, scales, scratch, n, H, MOST, False)


def warps(width: int) -> int:
    """Return the number of warps for a row: 16 values a thread, up to 512 threads."""
    return min(max(int(triton.next_power_of_2(width)) // 512, 1), 16)


def norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, row_of: torch.Tensor | None = None
) -> None:
    """Compute out[n] = norm(x[row_of[n]]), or of x[n] without `row_of` (see the module).

    Args:
        x: float32 [N, H], contiguous, as all of these.
        weight: bfloat16 or float32 [H].
        eps: The model's norm_eps.
        out: bfloat16 [R, H].
        row_of: int32 or int64 [R], on the device, where only some rows are wanted.
    """
    rows, width = out.shape
    if rows:
        norm_kernel[(rows,)](
            x, weight, out, row_of, eps, width, triton.next_power_of_2(width), num_warps=warps(width),
            enable_fp_fusion=False,
        )  # fmt: skip


def add_norm(
    partials: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """Compute x += tree of the partials + bias, in place, and out = norm(x): the same bits as `merge`, then `norm`.

    Args:
        partials: float32 [G, N, H], from `partial_sums` of a linear.
        x: float32 [N, H], the residual stream.
        weight: bfloat16 or float32 [H].
        eps: The model's norm_eps.
        out: bfloat16 [N, H].
        bias: bfloat16 or float32 [H], of the linear.
    """
    count, rows, width = partials.shape
    add_norm_kernel[(rows,)](
        partials, x, bias, weight, out, rows, eps, width, count, triton.next_power_of_2(width),
        num_warps=warps(width), enable_fp_fusion=False,
    )  # fmt: skip


def norm_int8(x: torch.Tensor, weight: torch.Tensor, eps: float, row_of: torch.Tensor | None = None) -> Int8Rows:
    """Return norm(x[row_of[n]]), or of x[n] without `row_of`, rotated and rounded from float32 to int8 (rotation.py).

    Args:
        x: float32 [N, H], contiguous.
        weight: bfloat16 or float32 [H].
        eps: The model's norm_eps.
        row_of: int32 or int64 [R], on the device, where only some rows are wanted.
    """
    return _norm_int8(None, x, None, weight, eps, row_of, len(x) if row_of is None else len(row_of))


def add_norm_int8(
    partials: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, bias: torch.Tensor | None = None
) -> Int8Rows:
    """Add partial sums to x as `add_norm` does, and return `norm_int8` of it."""
    return _norm_int8(partials, x, bias, weight, eps, None, len(x))


def _norm_int8(
    partials: torch.Tensor | None,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    row_of: torch.Tensor | None,
    rows: int,
) -> Int8Rows:
    width, count = x.shape[1], 0 if partials is None else len(partials)
    most = largest_power(width)
    out = new_int8_rows(rows, width, x.device)
    normed, scratch = x.new_empty((2, rows, width))
    if rows:
        norm_int8_kernel[(rows,)](
            partials, x, bias, weight, out.values, out.scales, row_of, normed, scratch, rows, eps,
            width, count, triton.next_power_of_2(width), most, num_warps=rotation_warps(most), enable_fp_fusion=False,
        )  # fmt: skip
    return out
