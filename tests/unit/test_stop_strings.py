"""Stop strings in pieces, against looking for them in the whole text."""

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text.stop_strings import StopStrings

TEXT = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(TEXT, max_size=8), stops=STOPS)
def test_pieces_add_up_to_the_text_before_the_earliest_stop(pieces, stops):
    watcher = StopStrings(stops)
    told = ""
    for i, piece in enumerate(pieces):
        certain, stop = watcher.push(piece)
        told += certain
        so_far = "".join(pieces[: i + 1])
        if stop is not None:
            assert stop in stops and so_far[len(told) :].startswith(stop)
            break
        assert not any(s in so_far for s in stops), "a stop string went by unnoticed"
        held = so_far[len(told) :]
        assert not held or any(s.startswith(held) for s in stops), "text was held back for nothing"
    else:
        told += watcher.flush()
    # A stop that begins earlier may be completed later: the first one completed counts, as in a stream it must.
    assert "".join(pieces).startswith(told)
    if not any(stop in "".join(pieces) for stop in stops):
        assert told == "".join(pieces)


def test_not_armed_yet():
    watcher = StopStrings(["b"])
    assert watcher.push("ab", armed=False) == ("ab", None)
    assert watcher.push("ab") == ("a", "b")


def test_the_longest_of_those_that_begin_together():
    assert StopStrings(["a", "ab"]).push("xab") == ("x", "ab")
