"""Masks of the tokens that a sequence may take next, besides those of grammars: allowed tokens, and forced ones."""

from collections.abc import Iterable

import numpy as np

from .sequence import Sequence


def mask_of(tokens: Iterable[int]) -> bytes:
    """Return a mask that allows only these tokens, in the form of SamplingBatch.masks."""
    ids = np.fromiter(tokens, np.intp)
    bits = np.zeros(32 * (int(ids.max()) // 32 + 1), bool)
    bits[ids] = True
    return np.packbits(bits, bitorder="little").tobytes()


def restrict(
    masks: list[bytes] | None, sequences: list[Sequence], owner: np.ndarray, outputs: np.ndarray
) -> tuple[list[bytes], np.ndarray]:
    """Apply allowed_token_ids and budgets of reasoning to the masks of a step's sampled rows.

    Args:
        masks: those of grammars, empty for rows without one; None if there are none.
        owner, outputs: for each row, the index of its sequence, and the number of its output; negative for a row that
            gives the logprob of a prompt token.

    Returns:
        The masks, and for each row whether a token is forced, whatever else the request says: bool [R].
    """
    masks, forced = masks or [b""] * len(owner), np.zeros(len(owner), bool)
    for row, (i, output) in enumerate(zip(owner.tolist(), outputs.tolist(), strict=True)):
        seq = sequences[i]
        if output < 0:
            continue
        token = seq.thinking.forced_token if seq.thinking is not None else None
        if token is not None and (not masks[row] or _allows(masks[row], token)):
            masks[row], forced[row] = mask_of([token]), True
        elif seq.allowed is not None:
            masks[row] = _intersection(masks[row], seq.allowed) if masks[row] else seq.allowed
    return masks, forced


def _allows(mask: bytes, token: int) -> bool:
    """Return whether a grammar's mask allows a token. In the middle of a character, it allows no special token."""
    return token // 8 < len(mask) and bool(mask[token // 8] >> token % 8 & 1)


def _intersection(one: bytes, other: bytes) -> bytes:
    """Return the tokens that both masks allow. A mask bans the tokens after its last word."""
    length = min(len(one), len(other))
    words = np.frombuffer(one[:length], np.uint32) & np.frombuffer(other[:length], np.uint32)
    return words.tobytes()
