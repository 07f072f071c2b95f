"""The router over many requests: recent work, new replicas, gaps among cached pages; and what engines publish."""

import math
from array import array
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.config import EngineConfig
from octavo.engine.loading import assemble
from octavo.engine.messages import EngineRequest
from octavo.frontend.links.engine_loop import EngineLoop
from octavo.frontend.links.messages import FromEngine, Pages, Submit, ToEngine, WatchPages
from octavo.frontend.router import MEMORY, Load, Router
from octavo.kv import Prefix, page_keys, root_key
from octavo.params import SamplingParams
from octavo.simulation import CostModel, SimulatedBackend, VirtualClock, text

PAGE = 4
ROOT = root_key("a model", "", "")


def keys(tokens: Sequence[int]) -> list[bytes]:
    whole = Prefix(ROOT, array("i", tokens), PAGE)
    return [whole.key(page) for page in range(len(tokens) // PAGE)]


def choose(router: Router, loads: list[Load], tokens: list[int]) -> tuple[int, int]:
    """Return the index of the best replica, and how many of the tokens are cached there."""
    best, pages = router.choose(loads, len(tokens), page_keys(ROOT, tokens, PAGE), PAGE)
    return best, pages[best] * PAGE


def replicas_of(router: Router, count: int) -> list[Load]:
    return [router.new_replica() for _ in range(count)]


def serve(router: Router, loads: list[Load], tokens: list[int]) -> int:
    """Route a request to idle replicas. Return the index of the chosen one, which then has its pages."""
    best, _ = choose(router, loads, tokens)
    assert loads[best].publish(loads[best].number, b"".join(keys(tokens)), b"")
    return best


def test_idle_replicas_share_the_conversations_of_a_popular_system_prompt() -> None:
    """And those with a long history stay where they are."""
    loads, system = replicas_of(router := Router(), 4), [1] * 400
    router.mean_output = 10.0
    firsts = Counter(serve(router, loads, [*system, 2, i]) for i in range(1000))
    assert max(firsts.values()) < 1.2 * 250
    history = [9] * 4000
    home = serve(router, loads, history)
    assert all(serve(router, loads, [*history, 5, i]) == home for i in range(20))


def test_a_new_replica_begins_with_the_mean_of_the_recent_work() -> None:
    """So it does not attract the conversations of all others."""
    loads = replicas_of(router := Router(), 3)
    for i in range(300):
        serve(router, loads, [i] * 40)
    home = serve(router, loads, [1] * 400)
    loads.append(router.new_replica())
    assert serve(router, loads, [*[1] * 400, 2]) == home
    assert loads[3].recent == pytest.approx(sum(load.recent for load in loads[:3]) / 3, rel=0.1)


def test_recent_work_is_forgotten() -> None:
    loads = replicas_of(router := Router(), 2)
    router.mean_output = 0.0
    choose(router, loads, [1] * 100)
    for _ in range(2 * MEMORY):
        choose(router, loads, [1])
    expected = 100 / math.e + 2 * MEMORY * (1 - 1 / math.e)
    assert sum(load.recent for load in loads) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("seconds, share", [(0.001, 0.5), (0.0015, 0.5), (0.003, 1.0)])
def test_small_differences_of_measured_speed_do_not_matter(seconds: float, share: float) -> None:
    """Of idle replicas, the faster one is chosen only if it is clearly faster."""
    loads = replicas_of(router := Router(), 2)
    loads[0].seconds_per_token, loads[1].seconds_per_token = 0.001, seconds
    chosen = [serve(router, loads, [*[1] * 40, 2, i]) for i in range(400)]
    assert chosen.count(0) / 400 == pytest.approx(share, rel=0.1)


@given(st.lists(st.tuples(st.sets(st.integers(0, 11)), st.integers(0, 30)), min_size=1, max_size=6))
def test_gaps_among_cached_pages_are_noticed(replicas: list[tuple[set[int], int]]) -> None:
    tokens, router = [*range(49)], Router()
    loads = replicas_of(router, len(replicas))
    for load, (pages, queued) in zip(loads, replicas, strict=True):
        assert load.publish(0, b"".join(keys(tokens)[page] for page in pages), b"")
        load.add("a request", queued, 0)
    exact = router.cached_pages(loads, len(tokens), keys(tokens), PAGE)
    costs = [49 - PAGE * count + queued for count, (_, queued) in zip(exact, replicas, strict=True)]
    best, cached = choose(router, loads, tokens)
    assert (costs[best], cached) == (min(costs), PAGE * exact[best])


def test_engines_publish_the_keys_of_full_pages() -> None:
    """Partial pages of finished sequences, which have longer keys, are left out."""
    costs = CostModel(
        settings={}, machine={}, page_size=PAGE, page_bytes=1, num_pages=100, max_model_len=100, rows_ms=[(1, 1.0)],
        sampled_ms=[(1, 0.0)], kv_token_us=0, pair_us=0, step_ms=0, sequence_us=0, row_us=0,
    )  # fmt: skip
    clock = VirtualClock()
    engine = assemble(
        EngineConfig(),
        SimulatedBackend(costs, clock),
        num_pages=100,
        max_model_len=100,
        fingerprint="a model",
        clock=clock,
    )
    prompts = [text(i, 10 + i).tolist() for i in range(5)]
    params = SamplingParams(max_tokens=3, ignore_eos=True, seed=0)
    submit = Submit([EngineRequest(str(i), prompt, params) for i, prompt in enumerate(prompts)])
    sent: list[FromEngine] = []

    def receive(wait: bool) -> list[ToEngine] | None:
        messages = script.pop(0) if script else []
        return messages if messages or engine.has_work else None

    for watch_first in (True, False):
        script: list[list[ToEngine]] = [[WatchPages(), submit]] if watch_first else [[WatchPages()]]
        sent.clear()
        EngineLoop(engine, sent.append, lambda: None).run(receive)
        load = Router().new_replica()
        assert all(load.publish(each.number, each.gained, each.lost) for each in sent if isinstance(each, Pages))
        computed = [text(i, 10 + i + 2).tolist() for i in range(5)]  # the last token's K and V are not
        assert load.pages == {key for tokens in computed for key in keys(tokens)}
        assert len(engine.kv.pool.keys) > len(load.pages)  # there are partial pages
