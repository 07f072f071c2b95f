"""Router: the choice of a replica against a naive reference, and what it knows about the replicas' work and pages."""

from array import array
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.frontend.router import USUAL_OUTPUT, Load, Router
from octavo.kv import Prefix, page_keys, root_key

PAGE = 4
ROOT = root_key("fingerprint", "tenant", "")


def keys(tokens: list[int]) -> list[bytes]:
    """Return the keys of all full pages."""
    one = Prefix(ROOT, array("i", tokens), PAGE)
    return [one.key(page) for page in range(len(tokens) // PAGE)]


def choose(router: Router, loads: list[Load], tokens: list[int]) -> tuple[int, int]:
    """Return the index of the best replica, and how many of the tokens are cached there."""
    best, pages = router.choose(loads, len(tokens), page_keys(ROOT, tokens, PAGE), PAGE)
    return best, pages[best] * PAGE


def replicas_of(router: Router, *seconds_per_token: float) -> list[Load]:
    loads = [router.new_replica() for _ in seconds_per_token]
    for load, seconds in zip(loads, seconds_per_token, strict=True):
        load.seconds_per_token = seconds
    return loads


@dataclass
class Known:
    """What a naive router keeps about a replica: the page-aligned beginnings of prompts that its cache has."""

    cached: set[tuple[int, ...]]
    queued: int
    completions: int
    seconds_per_token: float

    def load(self, router: Router) -> Load:
        (load,) = replicas_of(router, self.seconds_per_token)
        pages = [keys(list(beginning))[-1] for beginning in self.cached]
        assert load.publish(0, b"".join(pages), b"")
        load.add("a request", self.queued, self.completions)
        return load

    def hit(self, tokens: list[int]) -> int:
        """Return how many of the first tokens are cached, page by page; the last one is always computed."""
        count = 0
        while count + PAGE < len(tokens) and tuple(tokens[: count + PAGE]) in self.cached:
            count += PAGE
        return count


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[Known], list[int]]:
    """A prompt, and replicas that have any pages of it and of other prompts."""
    tokens = draw(st.lists(st.integers(1, 3), min_size=1, max_size=26))
    beginnings = [tuple(tokens[:end]) for end in range(PAGE, len(tokens) + 1, PAGE)]
    others = [(9,) * PAGE, (*tokens[:3], 9)]
    known = st.builds(
        Known,
        cached=st.sets(st.sampled_from([*beginnings, *(other for other in others if len(other) == PAGE)])),
        queued=st.integers(0, 60),
        completions=st.integers(0, 3),
        seconds_per_token=st.sampled_from([0.0, 0.001, 0.002, 0.0005]),
    )
    return draw(st.lists(known, min_size=1, max_size=5)), tokens


@given(choices())
@settings(deadline=None)
def test_a_choice_is_the_naive_one(choice: tuple[list[Known], list[int]]) -> None:
    replicas, tokens = choice
    fastest = min((each.seconds_per_token for each in replicas if each.seconds_per_token), default=1.0)
    costs = [
        (len(tokens) - each.hit(tokens) + each.queued + each.completions * USUAL_OUTPUT)
        * (each.seconds_per_token or fastest)
        for each in replicas
    ]
    router = Router()
    loads = [each.load(router) for each in replicas]
    hits = [each.hit(tokens) // PAGE for each in replicas]
    assert router.cached_pages(loads, len(tokens), keys(tokens), PAGE) == hits
    assert router.cached_pages(loads[1:], len(tokens), keys(tokens), PAGE) == hits[1:]
    best, cached = choose(router, loads, tokens)
    assert best == costs.index(min(costs))
    assert cached == replicas[best].hit(tokens)


def test_a_long_prefix_outweighs_a_little_load_and_much_load_outweighs_it() -> None:
    tokens = [1] * 40
    has, idle = replicas_of(router := Router(), 0, 0)
    has.publish(0, b"".join(keys(tokens)), b"")
    has.add("small", 30, 0)
    assert choose(router, [idle, has], tokens) == (1, 36)
    has.add("large", 10, 0)
    assert choose(router, [idle, has], tokens) == (0, 0)


def test_a_faster_replica_gets_more() -> None:
    slow, fast = replicas_of(router := Router(), 0.002, 0.001)
    fast.add("a request", 9, 0)
    assert choose(router, [slow, fast], [1] * 10)[0] == 1
    fast.add("another", 2, 0)
    assert choose(router, [slow, fast], [1] * 10)[0] == 0


def test_equal_replicas_take_turns() -> None:
    loads = replicas_of(router := Router(), 0, 0, 0, 0)
    chosen = [choose(router, loads, [1, 2])[0] for _ in range(40)]
    assert Counter(chosen) == dict.fromkeys(range(4), 10)
    assert all(len(set(chosen[i : i + 4])) == 4 for i in range(37))


def test_one_of_unknown_speed_counts_as_the_fastest() -> None:
    loads = replicas_of(router := Router(), 0.001, 0.004, 0)
    loads[2].add("a request", 1, 0)
    loads[0].add("a request", 2, 0)
    assert choose(router, loads, [1] * 9)[0] == 2


def test_the_mean_output_follows_the_outputs() -> None:
    router = Router()
    load = router.new_replica()
    load.add("a request", 5, 2)
    assert router.work(load) == 5 + 2 * USUAL_OUTPUT
    for _ in range(500):
        router.ended(10)
    assert router.work(load) == pytest.approx(5 + 2 * 10, rel=0.01)


@given(st.lists(st.tuples(st.sampled_from(["add", "started", "remove", "finish"]), st.integers(0, 5)), max_size=60))
def test_work_is_the_sum_over_the_requests(actions: list[tuple[str, int]]) -> None:
    load, there = (
        Router().new_replica(),
        dict[int, tuple[int, int, bool]](),
    )  # tokens, completions, whether it has a token
    for action, id in actions:
        if action == "add" and id not in there:
            there[id] = (10 + id, 1 + id % 3, False)
            load.add(id, *there[id][:2])
        elif action == "started":
            load.started(id)
            if id in there:
                there[id] = (*there[id][:2], True)
        elif action == "remove" and id in there:
            load.remove(id, there.pop(id)[1])
        elif action == "finish" and id in there and there[id][1] > 1:  # one of several completions
            there[id] = (there[id][0], there[id][1] - 1, there[id][2])
            load.completions -= 1
        waiting = {id: tokens for id, (tokens, _, has_token) in there.items() if not has_token}
        assert load.unstarted == waiting and load.queued_tokens == sum(waiting.values())
        assert load.completions == sum(completions for _, completions, _ in there.values())
    for id, (_, completions, _) in there.items():
        load.remove(id, completions)
    assert (load.unstarted, load.queued_tokens, load.completions) == ({}, 0, 0)


@given(
    st.lists(st.tuples(st.sets(st.integers(0, 9)), st.sampled_from(["arrives"] * 4 + ["is lost", "all again"]))),
)
def test_pages_are_those_of_the_engine_unless_a_message_is_missing(
    changes: list[tuple[set[int], str]],
) -> None:
    """An engine that always has the given pages publishes what it gained and lost."""
    load, number, before = Router().new_replica(), 1, set[bytes]()
    assert load.publish(0, b"", b"")
    is_lost = False
    for numbers, fate in changes:
        pages = {bytes([each]) * 16 for each in numbers}
        gained, lost = b"".join(pages - before), b"".join(before - pages)
        before = pages
        if fate == "all again":
            assert load.publish(0, b"".join(pages), b"")
            number, is_lost = 1, False
            assert load.pages == pages
            continue
        number += 1
        if fate == "is lost":
            is_lost = True
            continue
        assert load.publish(number - 1, gained, lost) is not is_lost
        assert is_lost or load.pages == pages


def test_a_new_engine_has_neither_work_nor_pages() -> None:
    (load,) = replicas_of(Router(), 0.5)
    load.publish(0, b"k" * 32, b"")
    load.publish(1, b"m" * 16, b"k" * 16)
    load.add("a request", 5, 2)
    load.clear()
    assert (load.pages, load.unstarted, load.queued_tokens, load.completions) == (set(), {}, 0, 0)
    assert not load.publish(2, b"n" * 16, b"") and not load.pages
    assert load.seconds_per_token == 0.5  # of this machine


@given(st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 5)), st.booleans()), max_size=40))
def test_replicas_that_come_and_go_leave_no_pages_behind(changes: list[tuple[int, set[int], bool]]) -> None:
    router, tokens = Router(), [*range(25)]
    loads = [router.new_replica() for _ in range(4)]
    for i, numbers, is_replaced in changes:
        if is_replaced:
            router.remove(loads[i])
            loads[i] = router.new_replica()
        else:
            assert loads[i].publish(0, b"".join(keys(tokens)[page] for page in numbers), b"")
        expected = [
            [key in load.pages for key in keys(tokens)].index(False) if len(load.pages) < 6 else 6 for load in loads
        ]
        assert router.cached_pages(loads, len(tokens), keys(tokens), PAGE) == expected
    for load in loads:
        router.remove(load)
        router.remove(load)
    assert not router._holders and not router._loads
    assert router.new_replica().bit == 1
