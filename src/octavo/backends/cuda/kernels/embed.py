"""Embedding: the weight's row of each token."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # columns of a program


@triton.jit(do_not_specialize=["first", "count"])
def embed_kernel(
    tokens,
    kept,
    weight,
    scales,
    out,
    first,
    count,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[r, :] = weight[t - first, :], times scales[t - first] if SCALED; 0 if there is no such row of `count`.

    t = tokens[r], or kept[-1 - tokens[r]] if that is negative, or 0 if this is negative too. `out` is float32.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row)
    if token < 0:
        token = tl.maximum(tl.load(kept - 1 - token), 0)
    token = token.to(tl.int64) - first
    known = (column < WIDTH) & (token >= 0) & (token < count)
    x = tl.load(weight + token * WIDTH + column, mask=known, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(scales + token, mask=(token >= 0) & (token < count), other=0.0)
    tl.store(out + row * WIDTH + column, x, mask=column < WIDTH)


def embed(
    tokens: Tensor, kept: Tensor, weight: Tensor, out: Tensor, scales: Tensor | None = None, first: int = 0
) -> None:
    """Write the weight's row of each token, zeros for a token of which the weight has none.

    Args:
        tokens: int32 [N], as in a StepBatch; a padded row has any valid token.
        kept: int32, the tokens that earlier steps have sampled, by place; -1 where one has failed.
        weight: float32, bf16 or int8 [rows, hidden], contiguous.
        out: float32 [N, hidden].
        scales: float32 [rows], by which the rows are multiplied, or None.
        first: the token of the weight's first row.
    """
    rows, width = out.shape
    embed_kernel[(rows, triton.cdiv(width, _BLOCK))](
        tokens,
        kept,
        weight,
        tokens if scales is None else scales,
        out,
        first,
        len(weight),
        WIDTH=width,
        SCALED=scales is not None,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
