"""Random traffic through the scheduler and the KV cache, over a memory that remembers what was written where."""

import sys
from array import array
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.config import POLICIES, EngineConfig
from octavo.engine.loading import load_policy
from octavo.engine.messages import EngineRequest
from octavo.engine.recovery import Recovery
from octavo.engine.scheduler import Scheduler, StepPlan
from octavo.engine.sequence import Sequence
from octavo.kv import KVCache, Prefix, root_key
from octavo.params import SamplingParams

PAGE = 4


class Simulation:
    """Does what an engine does, with a device whose K/V of a token is the prefix that ends in it."""

    def __init__(
        self,
        num_pages: int,
        max_batch_size: int,
        max_batch_tokens: int,
        prefix_caching: bool = True,
        policy: str = "fcfs",
        **settings: Any,
    ):
        self.kv = KVCache(num_pages, PAGE, prefix_caching, self.copy_page)
        self.policy = load_policy(EngineConfig(scheduling_policy=policy, **settings))
        self.scheduler = Scheduler(self.kv, self.policy, Recovery("auto", PAGE), max_batch_size, max_batch_tokens)
        self.max_batch_size, self.max_batch_tokens = max_batch_size, max_batch_tokens
        self.memory: list[list[tuple[int, ...] | None]] = [[None] * PAGE for _ in range(num_pages)]
        self.live: dict[str, Sequence] = {}
        self.finished: dict[str, list[int]] = {}
        self.arrivals = 0
        self.now = 0.0  # a step takes a second

    def add(self, prompt: list[int], max_tokens: int, after: str | None = None, **terms: Any) -> str:
        """`terms`: tenant, priority, ttft_target."""
        params = SamplingParams(max_tokens=max_tokens)
        request = EngineRequest(str(self.arrivals), prompt, params, self.now, after=after, **terms)
        tokens = array("i", prompt)
        prefix = Prefix(root_key("", "", ""), tokens, PAGE)
        seq = Sequence(request, self.arrivals, frozenset(), tokens, prefix, len(prompt), len(prompt) + max_tokens)
        self.arrivals += 1
        self.live[seq.id] = seq
        self.scheduler.add(seq, after=self.live.get(after or ""))
        return seq.id

    def copy_page(self, source: int, target: int) -> None:
        self.memory[target] = list(self.memory[source])

    def abort(self, id: str) -> None:
        self.scheduler.abort(self.live.pop(id))

    def step(self) -> StepPlan:
        self.now += 1
        plan = self.scheduler.schedule()
        self.check(plan)
        for seq, chunk in zip(plan.sequences, plan.chunks, strict=True):  # every row writes, then every row reads
            for position in range(seq.num_computed, seq.num_computed + chunk):
                page = seq.held.pages[position // PAGE]
                self.memory[page][position % PAGE] = tuple(seq.tokens[: position + 1])
        for seq, chunk in zip(plan.sequences, plan.chunks, strict=True):
            for position in range(seq.num_computed + chunk):
                seen = self.memory[seq.held.pages[position // PAGE]][position % PAGE]
                assert seen == tuple(seq.tokens[: position + 1]), "a sequence reads K and V that are not its own"
        for seq, chunk in zip(plan.sequences, plan.chunks, strict=True):
            sampled = chunk == seq.num_uncomputed
            if seq.num_computed < seq.num_prompt <= seq.num_computed + chunk:
                self.scheduler.let_go(seq)
            seq.num_computed += chunk
            self.kv.commit(seq.held, seq.num_computed)
            if sampled:
                seq.tokens.append(sum(seq.tokens) % 3)  # a model whose next token depends on all before it
                if len(seq.tokens) == seq.max_tokens:
                    self.scheduler.finish(seq)
                    self.finished[seq.id] = list(self.live.pop(seq.id).tokens)
        return plan

    def check(self, plan: StepPlan) -> None:
        assert sum(plan.chunks) <= self.max_batch_tokens
        assert all(chunk >= 1 for chunk in plan.chunks)
        assert len(plan.sequences) <= self.max_batch_size
        assert len({seq.id for seq in plan.sequences}) == len(plan.sequences)
        assert len({seq.slot for seq in plan.sequences}) == len(plan.sequences)
        assert all(not seq.aborted for seq in plan.sequences)
        decoding = plan.sequences[: plan.num_decoding]
        assert all(seq.num_uncomputed == chunk == 1 for seq, chunk in zip(decoding, plan.chunks, strict=False))

    def assert_empty(self) -> None:
        assert self.kv.pool.num_available == self.kv.pool.num_pages, "pages leaked"
        assert not self.scheduler.running and self.scheduler.num_waiting == 0 and not self.scheduler.has_work


PROMPT = st.lists(st.integers(0, 2), min_size=1, max_size=20)
TERMS = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from("abcd"),
        "priority": st.integers(-2, 2),
        "ttft_target": st.none() | st.floats(0.1, 100),
    }
)
EVENT = st.one_of(
    st.tuples(st.just("add"), PROMPT, st.integers(1, 12), TERMS),
    st.tuples(st.just("fork"), PROMPT, st.integers(1, 12), TERMS),
    st.tuples(st.just("abort"), st.integers(0, 100)),
    st.tuples(st.just("step"), st.integers(1, 5)),
)


@settings(max_examples=200, deadline=None)
@given(
    events=st.lists(EVENT, max_size=40),
    num_pages=st.integers(8, 24),  # the longest sequence needs 8
    max_batch_size=st.integers(1, 6),
    max_batch_tokens=st.integers(1, 24),
    prefix_caching=st.booleans(),
    policy=st.sampled_from(POLICIES),
)
def test_random_traffic(events, num_pages, max_batch_size, max_batch_tokens, prefix_caching, policy):
    """No page is shared by accident or leaked, the budget is kept, and everybody is served."""
    sim = Simulation(num_pages, max_batch_size, max_batch_tokens, prefix_caching, policy, tenant_weights="a=0.3,b=3")
    expected: dict[str, list[int]] = {}

    def add(prompt, max_tokens, terms, after=None):
        id = sim.add(prompt, max_tokens, after, **terms)
        tokens = list(prompt)
        for _ in range(max_tokens):
            tokens.append(sum(tokens) % 3)
        expected[id] = tokens
        return id

    for event in events:
        if event[0] == "add":
            add(event[1], event[2], event[3])
        elif event[0] == "fork":
            leader = add(event[1], event[2], event[3])
            add(event[1], event[2] + 1, event[3], after=leader)
        elif event[0] == "abort" and sim.live:
            id = sorted(sim.live)[event[1] % len(sim.live)]
            sim.abort(id)
            del expected[id]
        elif event[0] == "step":
            for _ in range(event[1]):
                sim.step()
    patience = 40 + sum(len(tokens) for tokens in expected.values()) * 40
    while sim.live:
        sim.step()
        patience -= 1
        assert patience > 0, f"{len(sim.live)} sequences are never served"
    assert sim.finished == expected
    sim.assert_empty()


def test_prompts_are_cut_into_chunks_beside_decoding():
    sim = Simulation(num_pages=32, max_batch_size=4, max_batch_tokens=8)
    sim.add([0], 10)
    sim.step()
    sim.add([1] * 20, 1)
    assert [sim.step().chunks for _ in range(3)] == [[1, 7], [1, 7], [1, 6]]


def test_the_earliest_arrival_is_never_preempted():
    sim = Simulation(num_pages=8, max_batch_size=4, max_batch_tokens=32)
    first = sim.add([0] * 8, 20)
    for prompt in range(1, 4):
        sim.add([prompt] * 4, 24)
    while sim.live:
        before = sim.live.get(first) and len(sim.live[first].tokens)
        sim.step()
        if before and first in sim.live:
            assert len(sim.live[first].tokens) == before + 1
    assert sim.scheduler.preemptions > 0
    sim.assert_empty()


def test_a_fork_computes_its_prompt_once():
    sim = Simulation(num_pages=32, max_batch_size=8, max_batch_tokens=64)
    leader = sim.add([0, 1, 2] * 6, 3)
    for _ in range(3):
        sim.add([0, 1, 2] * 6, 3, after=leader)
    assert sim.step().chunks == [18]
    assert sim.step().chunks == [1, 2, 2, 2]  # four full pages of the leader's are found


def test_a_cached_prefix_survives_until_its_page_is_needed():
    sim = Simulation(num_pages=8, max_batch_size=1, max_batch_tokens=64)
    sim.add([0] * 13, 1)
    sim.step()
    sim.add([0] * 12 + [1], 1)
    assert sim.step().chunks == [1]
    sim.add([2] * 29, 1)  # takes every page
    sim.step()
    sim.add([0] * 13, 1)
    assert sim.step().chunks == [13]


@pytest.mark.parametrize("policy", POLICIES)
def test_scheduling_does_not_slow_down_with_the_length_of_the_queue(policy: str):
    """Counted in lines of Python executed, not in seconds: steps that admit, step over the aborted, and preempt."""

    def lines(num_waiting: int) -> int:
        sim = Simulation(num_pages=12, max_batch_size=4, max_batch_tokens=8, policy=policy)
        for i in range(num_waiting):
            sim.add([0, 1, 2], 24, tenant=str(i % 20), priority=i % 3, ttft_target=i % 7)
        for i in range(num_waiting // 4):
            sim.abort(str(4 * i + 2))
        executed = 0

        def count(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal executed
            executed += event == "line"
            return count

        sys.settrace(count)
        try:
            for _ in range(100):
                sim.step()
        finally:
            sys.settrace(None)
        assert sim.finished and sim.scheduler.preemptions
        return executed

    assert lines(4000) < 1.5 * lines(200)


def test_a_long_prompt_leaves_a_token_for_each_later_arrival():
    sim = Simulation(num_pages=64, max_batch_size=8, max_batch_tokens=8, prefix_caching=False)
    leader = sim.add([0] * 20, 1)
    sim.add([0] * 20, 1, after=leader)  # enters the batch when the two below already run
    sim.add([1], 20)
    sim.add([2], 20)
    chunks = []
    while leader in sim.live or len(chunks) < 5:
        chunks.append(sim.step().chunks)
    assert chunks == [
        [8],
        [8],
        [
            4,
            1,
            1,
        ],
        [1, 1, 6],
        [1, 1, 6],
    ]
