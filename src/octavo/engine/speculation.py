"""Draft tokens without a draft model: the tokens that followed the last occurrence of the same few tokens.

Prompt lookup decoding (Saxena, 2023). A step computes draft tokens as further rows of their sequence and samples after
each of them; a draft token is accepted if it is the token sampled before it. The output is the same as without drafts,
since a row's result does not depend on the batch.
"""

from array import array

LONGEST, SHORTEST = 4, 2  # number of last tokens that must have occurred before
FREE_ROWS = 16  # rows of a CPU step that takes 1.5 times as long as one row, since the weights are read once


def propose_draft(tokens: "array[int]", limit: int) -> "array[int]":
    """Return at most `limit` draft tokens to follow `tokens`; none if the last few tokens never occurred before."""
    text = tokens.tobytes()
    width = tokens.itemsize
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        end = text[-length * width :]
        at = text.rfind(end, 0, len(text) - width)
        while at > 0 and at % width:  # skip matches that do not begin at the first byte of a token
            at = text.rfind(end, 0, at + len(end) - 1)
        if at >= 0 and at % width == 0:
            start = at // width + length
            return tokens[start : start + limit]
    return tokens[:0]
