"""The sizes of the steps that are CUDA graphs. A step is padded to the next size; steps beyond the last run without."""

import bisect
from dataclasses import dataclass
from functools import cached_property

_CHUNKS = (*range(64, 1024, 64), *range(1024, 2049, 128))  # rows of steps with chunks: later ones hide their launches
_SAMPLED = 64
MOST_ROWS = _CHUNKS[-1]


@dataclass(frozen=True)
class GraphShape:
    """The size of a graph's step.

    Attributes:
        rows: tokens.
        sampled: sampled rows.
        chunks: whether attention has large tiles too.
    """

    rows: int
    sampled: int
    chunks: bool


@dataclass(frozen=True)
class GraphShapes:
    """The shapes for steps of at most `max_batch_size` sequences and `max_batch_tokens` tokens."""

    max_batch_size: int
    max_batch_tokens: int

    @cached_property
    def decode(self) -> list[int]:
        """Return the rows of steps of single rows: 1, 2, 4, then steps of 8 to `max_batch_size` or more."""
        small = (size for size in (1, 2, 4) if size < self.max_batch_size)
        return [*small, *range(8, self.max_batch_size + 8, 8)]

    @property
    def most_sampled(self) -> int:
        """Return the most sampled rows, and the most sequences, of a step."""
        return self.decode[-1]

    @cached_property
    def first(self) -> list[GraphShape]:
        """Return the shapes to capture at start: all without chunks, and those with chunks that sample few rows."""
        chunks = [size for size in _CHUNKS if size < self.max_batch_tokens + 64]
        sampled = min(_SAMPLED, self.most_sampled)
        return [GraphShape(n, n, False) for n in self.decode] + [GraphShape(n, sampled, True) for n in chunks]

    @cached_property
    def of_each_power(self) -> list[GraphShape]:
        """Return one of `first` for each power of two of rows, at which the tiles of linear layers change."""
        return list({(shape.chunks, (shape.rows - 1).bit_length()): shape for shape in self.first}.values())

    def choose(self, rows: int, sampled: int, sequences: int, chunks: bool) -> GraphShape | None:
        """Return the shape for a step, or None if it has too many rows or sequences, or none."""
        if rows == 0 or sequences > self.most_sampled:
            return None
        if not chunks and rows <= self.decode[-1] and sampled <= rows:
            size = self.decode[bisect.bisect_left(self.decode, rows)]
            return GraphShape(size, size, False)
        if rows > _CHUNKS[-1] or sampled > self.most_sampled:
            return None
        size = _CHUNKS[bisect.bisect_left(_CHUNKS, rows)]
        few = min(_SAMPLED, self.most_sampled)
        return GraphShape(size, few if sampled <= few else self.most_sampled, True)
