"""The fixed spans in which linears whose inputs are split between tensor-parallel ranks sum their columns.

The sums of spans are added in a binary tree, ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)), by one rank or by many:
with R ranks, each computes the subtree of its count / R neighboring spans, and the ranks' sums, added in the same way,
are the top of the tree. So a result has the same bits for any R that divides the count. int8 activations, and weights
of 8 bits with a scale per row, are rotated and scaled span by span, so a rank needs no other rank to do its part.
"""

from .spec import DecoderSpec

ORDER = "spans 1"  # a name of these rules: change it with them, so that pages of other sums are not taken for these
MOST = 8  # spans of a linear
UNIT = 64  # columns; a span has whole units, but for the last column of all: they suit the kernels of every recipe


def span_ends(spec: DecoderSpec, weight: str) -> tuple[int, ...]:
    """Return the end of each span of a weight's columns: 1, 2, 4 or 8 of them, in ascending order; () for one span.

    - down: 8 spans that differ by at most one unit; fewer if there are fewer units.
    - out: spans of equally many whole heads, as many of 8, 4 or 2 as the heads and the units allow.
    - All others are not split by columns and have one span.
    """
    if weight.endswith(".down"):
        return _even_spans(spec.intermediate_size)
    if weight.endswith(".out"):
        return _spans_of_heads(spec.num_heads, spec.head_dim)
    return ()


def _even_spans(columns: int) -> tuple[int, ...]:
    units = -(-columns // UNIT)
    count = MOST
    while count > units:
        count //= 2
    return tuple(min(columns, (i + 1) * units // count * UNIT) for i in range(count))


def _spans_of_heads(heads: int, head_dim: int) -> tuple[int, ...]:
    count = MOST
    while count > 1 and (heads % count or heads // count * head_dim % UNIT):
        count //= 2
    return tuple((i + 1) * heads // count * head_dim for i in range(count))
