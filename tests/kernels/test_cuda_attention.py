"""The attention of the cuda backend without a GPU: kernels in the interpreter, and how a step is cut into tiles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interpreter import run_interpreted
from octavo.backends.cuda.kernels.attention_plan import PART, plan


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="needs the triton package")
    run_interpreted("cuda_attention.py")


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 4 * PART), st.integers(0, 70)), min_size=1, max_size=12),
    group=st.sampled_from([1, 3, 4, 16]),
    slots=st.integers(0, 100),
    enough=st.integers(0, 8),
)
def test_each_part_of_each_row_is_in_one_tile(pieces, group, slots, enough):
    query_start = np.cumsum([0, *(rows for _, rows in pieces)], dtype=np.int32)
    positions = np.concatenate([np.arange(first, first + rows) for first, rows in pieces]).astype(np.int32)
    cut = plan(query_start, positions, group, 16, 64, slots, enough)
    covered, taken = set(), set()
    for tiles, queries in ((cut.small, 16), (cut.large, 64)):
        for first, rows, sequence, part, slot in tiles.tolist():
            assert 0 < rows * group <= queries
            assert query_start[sequence] <= first and first + rows <= query_start[sequence + 1]
            for row in range(first, first + rows):
                in_parts = part >= 0
                assert in_parts == (cut.merges[row, 0] >= 0)
                for p in [part] if in_parts else range(positions[row] // PART + 1):
                    assert (row, p) not in covered
                    covered.add((row, p))
                if in_parts:
                    at = slot + row - first
                    assert at == cut.merges[row, 0] + part * cut.merges[row, 1]
                    assert 0 <= at < slots and at not in taken
                    taken.add(at)
    assert {(r, p) for r, position in enumerate(positions) for p in range(position // PART + 1)} <= covered
