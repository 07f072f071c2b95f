"""A/B splits: shares that hold exactly, and keys that keep their side."""

import random
from collections import Counter

import pytest

from octavo.fleet.specs import SplitSpec
from octavo.fleet.split import Split

REQUESTS = 10_000


def split(sticky: str | None = None, **shares: float) -> Split:
    return Split(SplitSpec("chat", shares, sticky))


@pytest.mark.parametrize(
    "shares",
    [{"a": 90, "b": 10}, {"a": 100, "b": 0}, {"a": 0, "b": 100}, {"a": 33.3, "b": 66.7}, {"a": 1, "b": 1, "c": 98}],
)
def test_shares_hold_at_any_time(shares: dict[str, float]) -> None:
    chosen, counts = split(**shares), Counter[str]()
    for number in range(1, REQUESTS + 1):
        counts[chosen.choose()] += 1
        for name, share in shares.items():
            assert abs(counts[name] - number * share / 100) < 1.5
    assert not {name for name, share in shares.items() if not share} & set(counts)


def keys() -> list[str]:
    chance = random.Random(0)
    return [f"user-{chance.getrandbits(64)}" for _ in range(REQUESTS)]


@pytest.mark.parametrize("shares", [{"a": 90, "b": 10}, {"a": 50, "b": 30, "c": 20}, {"a": 0, "b": 100}])
def test_a_key_keeps_its_side(shares: dict[str, float]) -> None:
    first, later = split("user", **shares), split("user", **dict(reversed(shares.items())))
    for _ in range(7):
        later.choose()  # requests without a user change nothing for those with one
    sides = Counter[str]()
    for key in keys():
        side = first.choose(key)
        assert later.choose(key) == side  # after a restart too, and in another order of the models
        sides[side] += 1
    for name, share in shares.items():
        assert abs(sides[name] / REQUESTS * 100 - share) < 1
    assert not {name for name, share in shares.items() if not share} & set(sides)


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        ({"a": 90, "b": 10}, {"a": 80, "b": 20}, {("a", "b"): 10}),
        ({"a": 90, "b": 5, "c": 5}, {"a": 80, "b": 10, "c": 10}, {("a", "b"): 5, ("a", "c"): 5}),
        ({"a": 50, "b": 50}, {"a": 100, "b": 0}, {("b", "a"): 50}),
    ],
)
def test_new_shares_move_few_keys(
    before: dict[str, float], after: dict[str, float], moved: dict[tuple[str, str], float]
) -> None:
    old, new = split("user", **before), split("user", **after)
    moves = Counter((old.choose(key), new.choose(key)) for key in keys())
    got = {move: number / REQUESTS * 100 for move, number in moves.items() if move[0] != move[1]}
    assert got.keys() == moved.keys()
    for move, share in moved.items():
        assert abs(got[move] - share) < 1


def test_keys_of_any_text() -> None:
    for key in ("", "\0", "é" * 10_000, "\ud800", "a\0b"):
        assert split("user", a=50, b=50).choose(key) in "ab"


def test_splits_do_not_agree_on_a_key() -> None:
    """Otherwise two tests with the same shares would have the same groups."""
    one, other = (Split(SplitSpec(name, {"a": 50, "b": 50}, "user")) for name in ("one", "other"))
    same = sum(one.choose(key) == other.choose(key) for key in keys())
    assert abs(same / REQUESTS - 0.5) < 0.02
