"""Traffic through the scheduler and the KV cache, at random and made up."""

import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import SamplingParams
from octavo.config import POLICIES
from octavo.engine.engine import Engine
from octavo.engine.messages import EngineRequest
from prefix_backend import PrefixBackend
from scheduler_simulation import Simulation

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
    mask_steps=st.integers(0, 3),
)
def test_random_traffic(events, num_pages, max_batch_size, max_batch_tokens, prefix_caching, policy, mask_steps):
    """No page is shared by accident or leaked, the budget is kept, no mask is missing, and everybody is served."""
    sim = Simulation(
        num_pages, max_batch_size, max_batch_tokens, prefix_caching, policy, mask_steps, tenant_weights="a=0.3,b=3"
    )
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
    patience = (40 + sum(len(tokens) for tokens in expected.values()) * 40) * (1 + mask_steps)
    while sim.live:
        sim.step()
        patience -= 1
        assert patience > 0, f"{len(sim.live)} sequences are never served"
    assert sim.finished == expected
    sim.assert_empty()


def test_a_sequence_that_is_not_ready_can_be_admitted_again():
    """It has tokens to compute in its first step, although all but its last token are in the cache."""
    sim = Simulation(num_pages=16, max_batch_size=2, max_batch_tokens=16)
    seq = sim.live[sim.add([0, 1, 2, 1], 8)]
    sim.step()
    sim.unready.clear()
    seq.ready = False
    sim.scheduler._preempt(seq)
    assert sim.step().chunks == [1] and seq.num_uncomputed == 1
    assert sim.step().chunks == []
    seq.ready = True
    assert sim.step().chunks == [1] and seq.num_outputs == 2


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


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fork_that_is_aborted_before_it_begins(policy: str):
    sim = Simulation(num_pages=32, max_batch_size=8, max_batch_tokens=8, policy=policy)
    leader = sim.add([0, 1, 2] * 6, 3)
    aborted, other = (sim.add([0, 1, 2] * 6, 3, after=leader) for _ in range(2))
    sim.step()
    sim.abort(aborted)
    while sim.live:
        sim.step()
    sim.assert_empty()
    last = sim.add([0], 1)
    sim.step()
    assert sim.finished.keys() == {leader, other, last}


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


@pytest.mark.parametrize("prompt", [[], [-1], [3], [2**31], [2**40, 1], [0] * 64])
def test_a_prompt_that_cannot_be_computed_fails_alone(prompt):
    """The frontend refuses it earlier; this is the engine's own check of what is sent to it."""
    engine = Engine(PrefixBackend(8, 4), num_pages=8, max_model_len=64, max_batch_size=2, max_batch_tokens=16)
    params = SamplingParams(max_tokens=1)
    engine.add(EngineRequest("wrong", prompt, params))
    engine.add(EngineRequest("right", [0, 1], params))
    outputs = {output.id: output for _ in range(2) for output in engine.step()}
    assert outputs["wrong"].finish_reason == "error" and "prompt" in (outputs["wrong"].message or "")
    assert outputs["right"].finish_reason == "length"
