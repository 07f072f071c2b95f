"""Draft tokens without a draft model: what followed the last time that the same few tokens occurred.

Prompt lookup decoding (Saxena, 2023). A step computes draft tokens as further rows of their sequence and samples after
each of them; a draft token is accepted if it is the token sampled before it. The output is the same as without drafts,
since a row's result does not depend on the batch.
"""

from array import array

LONGEST, SHORTEST = 4, 2  # tokens at the end of the text that must have occurred before
FREE_ROWS = 16  # a CPU step of so many rows takes 1.5 times one of a single row: it reads the weights once for all


def propose_draft(tokens: "array[int]", limit: int) -> "array[int]":
    """Return at most `limit` draft tokens to follow `tokens`; none if the last few tokens never occurred before."""
    text = tokens.tobytes()
    width = tokens.itemsize
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        end = text[-length * width :]
        at = text.rfind(end, 0, len(text) - width)
        while at > 0 and at % width:  # a match that does not begin where a token begins
            at = text.rfind(end, 0, at + len(end) - 1)
        if at >= 0 and at % width == 0:
            start = at // width + length
            return tokens[start : start + limit]
    return tokens[:0]
