"""RepetitionDetector against the definition."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo import RepetitionDetectionParams, SamplingParams
from octavo.errors import InvalidRequest
from octavo.frontend.repetition import RepetitionDetector


def repeats(tokens: list[int], params: RepetitionDetectionParams) -> bool:
    for size in range(max(params.min_pattern_size, 1), params.max_pattern_size + 1):
        pattern = tokens[-size:] * params.min_count
        if len(tokens) >= len(pattern) and tokens[-len(pattern) :] == pattern:
            return True
    return False


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 6), st.integers(0, 6), st.integers(2, 4))
def test_against_the_definition(tokens: list[int], most: int, least: int, count: int) -> None:
    params = RepetitionDetectionParams(max(most, least), least, count)
    detector, output = RepetitionDetector(params), list[int]()
    for token in tokens:
        output.append(token)
        assert detector.push(output) == repeats(output, params)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_pattern_size": 257, "min_count": 2},
        {"max_pattern_size": 2, "min_count": 1},
        {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2},
        {"max_pattern_size": -1},
        {"max_pattern_size": "2", "min_count": 2},
        {"pattern": 2},
        [],
    ],
)
def test_wrong_parameters(wrong: Any) -> None:
    with pytest.raises(InvalidRequest):
        SamplingParams(repetition_detection=wrong)
