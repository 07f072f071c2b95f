"""Stop strings in pieces, against looking for them in the whole text."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import SamplingParams
from octavo.errors import InvalidRequest
from octavo.text.stop_strings import StopStrings

TEXT = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


class Naive:
    """The definition: in all text that is not certain yet, look for the stop string that begins first."""

    def __init__(self, stops: list[str]):
        self.stops, self.held = stops, ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        text, self.held = self.held + text, ""
        if not armed:
            return text, None
        found = [(text.find(stop), -len(stop), stop) for stop in self.stops if stop in text]
        if found:
            at, _, stop = min(found)
            return text[:at], stop
        held = (n for n in range(len(text), 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stops))
        at = len(text) - next(held, 0)
        self.held = text[at:]
        return text[:at], None


@settings(max_examples=1000, deadline=None)
@given(pieces=st.lists(st.tuples(TEXT, st.sampled_from([True, True, True, False])), max_size=8), stops=STOPS)
def test_pieces_are_searched_as_the_definition_says(pieces, stops):
    ours, naive = StopStrings(stops), Naive(stops)
    for piece, armed in pieces:
        certain, stop = ours.push(piece, armed)
        assert (certain, stop) == naive.push(piece, armed)
        if stop is not None:
            return
    assert ours.flush("x") == naive.held + "x"


def test_not_armed_yet():
    watcher = StopStrings(["b"])
    assert watcher.push("ab", armed=False) == ("ab", None)
    assert watcher.push("ab") == ("a", "b")


def test_the_longest_of_those_that_begin_together():
    assert StopStrings(["a", "ab"]).push("xab") == ("x", "ab")


@pytest.mark.parametrize("text", ["a" * 20_000, "ab" * 10_000, "a" * 999 + "c" + "a" * 19_000])
def test_time_is_linear_whatever_the_stop_strings(text):
    """The work is counted in lines of Python, not in seconds, for text that almost matches long stop strings."""
    watcher = StopStrings(["a" * (1000 + n) + "b" for n in range(4)] + ["ab" * 500 + "c"])
    lines = 0

    def count(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return count

    sys.settrace(count)
    try:
        for start in range(0, len(text), 4):
            assert watcher.push(text[start : start + 4])[1] is None
    finally:
        sys.settrace(None)
    assert lines < 40 * len(text)


@pytest.mark.parametrize("stop", ["x" * 1025, ["a"] * 17, [""], ["ok", "x" * 2000]])
def test_limits_of_stop_strings(stop):
    with pytest.raises(InvalidRequest, match="at most 16 strings of 1 to 1,024 characters") as caught:
        SamplingParams(stop=stop)
    assert caught.value.param == "stop" and len(str(caught.value)) < 300
    SamplingParams(stop=["x" * 1024] * 16)
