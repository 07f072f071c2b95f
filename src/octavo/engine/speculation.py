"""Guesses at the next tokens without a draft model: what followed the last time that the text went like this.

Prompt lookup (Saxena, 2023). A step computes the guesses as further rows of the sequence, and samples after each of
them; those that turn out right are kept. Because rows come out the same in any batch, so do the tokens.
"""

from array import array

LONGEST, SHORTEST = 4, 2  # tokens at the end of the text that must have occurred before
FREE_ROWS = 16  # so many rows take a CPU half as long again as one, as the weights are read once for all of them


def propose_draft(tokens: "array[int]", limit: int) -> "array[int]":
    """At most `limit` tokens that may come next; none if the last ones never occurred before."""
    text = tokens.tobytes()
    width = tokens.itemsize
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        end = text[-length * width :]
        at = text.rfind(end, 0, len(text) - width)
        while at > 0 and at % width:  # between tokens, not within one
            at = text.rfind(end, 0, at + len(end) - 1)
        if at >= 0 and at % width == 0:
            start = at // width + length
            return tokens[start : start + limit]
    return tokens[:0]
