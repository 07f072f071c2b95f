"""The fixed tree in which sums over 1, 2, 4 or 8 spans of k are added (model/spans.py).

Spans come in order, so the sums that wait for a partner are those of a binary counter: at most one per level.
"""

import triton
import triton.language as tl


@triton.jit
def carry(part, s, pending0, pending1, pending2, COUNT: tl.constexpr):
    """Add the sum of span s to the sums that wait, as a binary counter is increased.

    Args:
        part: The sum of span s, float32 of any shape.
        s: The span, 0 to COUNT - 1; they come in order.
        pending0: What the call for s - 1 returned first.
        pending1, pending2: The waiting sums of 2 and 4 spans.

    Returns:
        (sum of the 1, 2, 4 or 8 spans that end with s: of all after the last; the new pending1; the new pending2)
    """
    if COUNT > 1:
        part = tl.where(s & 1 == 1, pending0 + part, part)
    if COUNT > 2:
        part = tl.where(s & 3 == 3, pending1 + part, part)
        pending1 = tl.where(s & 3 == 1, part, pending1)
    if COUNT > 4:
        part = tl.where(s & 7 == 7, pending2 + part, part)
        pending2 = tl.where(s & 7 == 3, part, pending2)
    return part, pending1, pending2


@triton.jit
def tree_sum(parts, stride, mask, COUNT: tl.constexpr):
    """Return the sum in tree order of COUNT blocks: part i is at pointers `parts + i * stride`."""
    pending0 = tl.load(parts, mask=mask, other=0)
    pending1, pending2 = pending0, pending0
    for i in tl.static_range(1, COUNT):
        part = tl.load(parts + i * stride, mask=mask, other=0)
        pending0, pending1, pending2 = carry(part, i, pending0, pending1, pending2, COUNT)
    return pending0
