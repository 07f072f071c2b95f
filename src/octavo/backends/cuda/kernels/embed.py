"""Embedding: the weight's row of each token."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # columns of a program


@triton.jit
def embed_kernel(tokens, kept, weight, scales, out, WIDTH: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """out[r, :] = weight[t, :], times scales[t] if SCALED; out is float32 [N, WIDTH].

    t = tokens[r], or kept[-1 - tokens[r]] if that is negative, or 0 if this is negative too.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row)
    if token < 0:
        token = tl.maximum(tl.load(kept - 1 - token), 0)
    token = token.to(tl.int64)
    x = tl.load(weight + token * WIDTH + column, mask=column < WIDTH).to(tl.float32)
    if SCALED:
        x = x * tl.load(scales + token)
    tl.store(out + row * WIDTH + column, x, mask=column < WIDTH)


def embed(tokens: Tensor, kept: Tensor, weight: Tensor, out: Tensor, scales: Tensor | None = None) -> None:
    """Write the weight's row of each token.

    Args:
        tokens: int32 [N], as in a StepBatch; a padded row has any valid token.
        kept: int32, the tokens that earlier steps have sampled, by place; -1 where one has failed.
        weight: float32, bf16 or int8 [vocab, hidden], contiguous.
        out: float32 [N, hidden].
        scales: float32 [vocab], by which the rows are multiplied, or None.
    """
    rows, width = out.shape
    embed_kernel[(rows, triton.cdiv(width, _BLOCK))](
        tokens,
        kept,
        weight,
        tokens if scales is None else scales,
        out,
        WIDTH=width,
        SCALED=scales is not None,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
