"""How the rows of a step are cut into tiles of attention. This decides speed only: no choice here changes a bit."""

from dataclasses import dataclass

import numpy as np

PART = 512  # positions whose sums start from zero; parts are merged in order
TILE_FIELDS = (
    6  # of a tile: first row, rows, sequence, part (-1: all parts), slot of its first row's sums, its position
)


@dataclass(frozen=True)
class Tiling:
    """The size of a tile in queries (rows times the query heads of a kv head), and how to compile for it."""

    rows: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """The tiles of a step, longest first. A tile in parts has a slot for each of its rows in each part.

    Attributes:
        small: int32 [n, TILE_FIELDS], tiles of sequences whose rows fit into one small tile.
        large: int32 [m, TILE_FIELDS], tiles of the others.
    """

    small: np.ndarray
    large: np.ndarray


def block_size(head_dim: int) -> int:
    """Return the positions of a block: part of the arithmetic, so the same for every tiling and architecture."""
    return 64 if head_dim <= 128 else 32


def tilings(head_dim: int, group: int, int8: bool = False, hopper: bool = True) -> tuple[Tiling, Tiling]:
    """Return the small tiling, for decoding, and the large one, for chunks: none of them spills registers.

    Args:
        group: query heads of a kv head.
        int8: whether keys and values are int8.
        hopper: whether the device has warp-group products (compute capability 9), which need tiles of 64 queries.
    """
    least = max(16, 1 << (group - 1).bit_length())
    small = Tiling(least, warps=8 if int8 else 4, stages=3)  # more stages are more code, which is read from memory too
    if head_dim > 128 or int8:
        rows = 32  # with int8, warp-group products differ in the last bits from those of small tiles (seen on an H200)
    elif not hopper or head_dim not in (64, 128):
        rows = 64
    else:
        rows = 128
    return small, Tiling(max(rows, least), warps=8, stages=5 if rows == 128 else 3)


def plan(
    query_start: np.ndarray, positions: np.ndarray, group: int, small: int, large: int, slots: int, enough: int
) -> Plan:
    """Cut a step into tiles, and tiles into parts: small ones while there are slots, large ones if tiles are few.

    Args:
        query_start: int32 [S + 1], and positions: int32 [N], as in StepBatch.
        group: query heads of a kv head.
        small: queries of a small tile, a multiple of 16; large: likewise.
        slots: how many sums of a row over a part can wait to be merged.
        enough: the number of large tiles from which on they are not cut into parts.
    """
    lengths = np.diff(query_start)
    per_small, per_large = small // group, large // group
    fits = lengths <= per_small
    tiles, used = _cut(query_start, positions, np.flatnonzero(fits & (lengths > 0)), per_small, slots, 0)
    chunks = np.flatnonzero(~fits)
    if -(-lengths[chunks] // per_large).sum() >= enough:
        slots = 0
    large_tiles, _ = _cut(query_start, positions, chunks, per_large, slots, used)
    return Plan(tiles, large_tiles)


def _cut(
    query_start: np.ndarray,
    positions: np.ndarray,
    sequences: np.ndarray,
    per_tile: int,
    slots: int,
    used: int,
) -> tuple[np.ndarray, int]:
    """Cut sequences into tiles of at most `per_tile` rows, and those into parts, longest first, while slots last.

    Args:
        used: slots that are taken.

    Returns:
        The tiles, int32 [n, TILE_FIELDS], and the number of slots that are taken now.
    """
    counts = -(-(query_start[sequences + 1] - query_start[sequences]) // per_tile)
    sequence = np.repeat(sequences, counts)
    index = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    row = query_start[sequence] + index * per_tile
    rows = np.minimum(per_tile, query_start[sequence + 1] - row)
    last = positions[row + rows - 1]
    order = np.argsort(-last, kind="stable")
    sequence, row, rows, last = sequence[order], row[order], rows[order], last[order]
    parts = last // PART + 1
    end = used + np.cumsum(np.where(parts > 1, parts * rows, 0))
    split = (parts > 1) & (end <= slots)
    slot = end - parts * rows
    pieces = np.where(split, parts, 1)
    of = np.repeat(np.arange(len(row)), pieces)
    part = np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = split[of]
    at = np.where(cut, slot[of] + part * rows[of], -1)
    size = np.where(cut, np.minimum(last[of] + 1 - part * PART, PART), last[of] + 1)
    fields = row[of], rows[of], sequence[of], np.where(cut, part, -1), at, positions[row[of]]
    tiles = np.stack(fields, axis=1).astype(np.int32)
    return tiles[np.argsort(-size, kind="stable")], int(end[split].max(initial=used))
