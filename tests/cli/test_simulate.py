"""octavo simulate: traces, cost models, and whether virtual time passes as real time would."""

import dataclasses
import itertools
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simulated_costs
from command_line import OCTAVO
from octavo.backends.base import Backend, ComputesAtOnce, StepBatch, StepResult
from octavo.bench.report import RequestTimes, Run
from octavo.config import POLICIES, EngineConfig
from octavo.engine.engine import MAX_IDLE
from octavo.engine.loading import assemble, load_engine
from octavo.errors import ConfigError
from octavo.simulation import CostModel, Shape, SimulatedBackend, VirtualClock, text
from octavo.simulation.conversations import Conversations
from octavo.simulation.costs import interpolate
from octavo.simulation.measure import nonnegative_fit
from octavo.simulation.placement import ROUTINGS
from octavo.simulation.replay import Replay, replay, simulate
from octavo.simulation.report import summarize, verdict
from octavo.simulation.trace import TraceRequest, parse_rate, poisson_trace, read_trace, trace_of, write_trace
from step_batches import step_batch

COMMAND = [*OCTAVO, "simulate"]
COSTS = msgspec.structs.replace(simulated_costs.COSTS, settings={"model": "smollm2", "quantization": "8bit"})
FREE = msgspec.structs.replace(
    COSTS, rows_ms=[(1, 0.0)], sampled_ms=[(1, 0.0)], kv_token_us=0, pair_us=0, step_ms=0, sequence_us=0, row_us=0
)


def scaled(costs: CostModel, factor: float) -> CostModel:
    return msgspec.structs.replace(
        costs,
        rows_ms=[(count, ms * factor) for count, ms in costs.rows_ms],
        sampled_ms=[(count, ms * factor) for count, ms in costs.sampled_ms],
        **{
            name: getattr(costs, name) * factor
            for name in ("kv_token_us", "pair_us", "step_ms", "sequence_us", "row_us")
        },
    )


def times(run: Replay) -> list[tuple[float | None, float, int]]:
    return [(served.first, served.last, served.output_tokens) for served in run.served]


# Traces


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    requests = [
        TraceRequest(at=0.0, prompt=[1, 2, 3], output_tokens=4, tenant="a", priority=-1),
        TraceRequest(at=1.5, prompt_tokens=7, output_tokens=1, ttft_target=0.5, timeout=9.0, conversation="c"),
        TraceRequest(at=2.5, prompt_tokens=70, output_tokens=1, prefix="system", prefix_tokens=64),
    ]
    write_trace(tmp_path / "trace", requests[::-1])
    assert read_trace(tmp_path / "trace") == requests  # in order of arrival


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "truncated"),
        ("[1]", "object"),
        ('{"at": 0, "output_tokens": 1}', "prompt_tokens"),
        ('{"at": 0, "output_tokens": 1, "prompt_tokens": 3, "prompt": [1]}', "give either"),
        ('{"at": 0, "output_tokens": 1, "prompt": []}', "prompt"),
        ('{"at": 0, "output_tokens": 1, "prompt": [-1]}', "prompt"),
        ('{"at": 0, "output_tokens": 0, "prompt_tokens": 3}', "output_tokens"),
        ('{"at": 0, "output_tokens": 1, "prompt_tokens": 1e99}', "prompt_tokens"),
        ('{"at": -1, "output_tokens": 1, "prompt_tokens": 3}', "at"),
        ('{"at": "0", "output_tokens": 1, "prompt_tokens": 3}', "at"),
        ('{"at": NaN, "output_tokens": 1, "prompt_tokens": 3}', "malformed"),
        ('{"output_tokens": 1, "prompt_tokens": 3}', "at"),
        ('{"at": 0, "output_tokens": 1, "prompt_tokens": 3, "timeout": 0}', "timeout"),
        ('{"at": 0, "output_tokens": 1, "prompt_tokens": 3, "prefix": "p"}', "prefix_tokens"),
        ('{"at": 0, "output_tokens": 1, "prompt": [3], "conversation": "c"}', "conversation"),
        ('{"at": 0, "output_tokens": 1, "prompt_tokens": 3, "think_time": 1}', "conversation"),
        ('{"at": 0, "output_tokens": 1, "prompt_tokens": 3, "priorty": 1}', "priorty"),
        ('{"at": 0, "output_tokens": 1, "prompt_tokens": 3, "tenant": "\udcff"}', "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    file = tmp_path / "trace"
    good = b'{"at": 0, "output_tokens": 1, "prompt_tokens": 3}\n'
    file.write_bytes(good + line.encode(errors="surrogateescape") + b"\n" + good)
    with pytest.raises(ConfigError, match="line 2: ") as error:
        read_trace(file)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_a_trace_needs_requests(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    for path in (tmp_path / "empty", tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            read_trace(path)


def test_arrivals_are_random_at_the_rate_asked_for() -> None:
    rate = parse_rate("10000/min")
    assert rate == pytest.approx(166.667, rel=1e-5)
    trace = poisson_trace(rate, 20_000, 128, 64, seed=1)
    gaps = np.diff([request.at for request in trace])
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.03)
    assert gaps.std() == pytest.approx(1 / rate, rel=0.05)  # as the exponential distribution has it
    assert trace == poisson_trace(rate, 20_000, 128, 64, seed=1) != poisson_trace(rate, 20_000, 128, 64, seed=2)
    assert [parse_rate(text) for text in ("2", "2/s", "120/min", "7200/hour", "0.5")] == [2, 2, 2, 2, 0.5]
    for bad in ("", "0", "-1", "1/fortnight", "fast", "1e3"):
        with pytest.raises(ConfigError, match="rate must be"):
            parse_rate(bad)


def test_a_benchmark_becomes_a_trace() -> None:
    requests = [RequestTimes(12.5, 30, 7), RequestTimes(10.0, 20, 5), RequestTimes(11.0, 9, error="HTTP 500")]
    assert trace_of(Run(requests, seconds=3)) == [
        TraceRequest(at=0.0, prompt_tokens=20, output_tokens=5),
        TraceRequest(at=2.5, prompt_tokens=30, output_tokens=7),
    ]


def test_texts_differ_everywhere_and_the_backend_goes_on_with_them() -> None:
    texts = np.array([text(number, 100) for number in range(500)])
    assert texts.min() >= 0 and texts.max() < 2**31
    assert all(len(np.unique(column)) == 500 for column in texts.T)
    backend = SimulatedBackend(FREE, VirtualClock())
    batch = step_batch([(texts[3, :60].tolist(), 0, [0, 1]), (texts[4, :1].tolist(), 0, [2])], sample=[59, 60])
    assert backend.step(batch).tokens.tolist() == [texts[3, 60], texts[4, 1]]


# Costs


def test_the_shape_of_a_step() -> None:
    """A sequence with 40 tokens computed and 3 new ones, and one whose first 2 tokens are computed."""
    assert Shape.of(step_batch([([1, 2, 3], 40, [0, 1]), ([4, 5], 0, [2])], sample=[2])) == Shape(
        sequences=2, rows=5, sampled=1, kv_tokens=43 + 2, pairs=41 + 42 + 43 + 1 + 2
    )


def test_a_curve_is_straight_between_its_points_and_beyond() -> None:
    curve = [(2, 1.0), (4, 3.0), (8, 11.0)]
    assert [interpolate(curve, count) for count in (1, 2, 3, 4, 6, 8, 10)] == [1, 1, 2, 3, 7, 11, 15]
    assert interpolate([(4, 3.0)], 9) == 3


def test_one_request_takes_the_sum_of_its_steps() -> None:
    """40 tokens in, in chunks of 32 and 8, and 3 out: worked out by hand."""
    trace = [TraceRequest(at=2.0, prompt_tokens=40, output_tokens=3)]
    run = simulate(trace, EngineConfig(max_batch_tokens=32, max_batch_size=4), COSTS, num_pages=10)
    chunk_32 = 6 + 6 * 16 / 48 + 0.2 + 0.003 + 32 * 0.0005 + 32 * 0.0005 + (32 * 33 / 2) * 0.00025
    chunk_8 = 5 + 7 / 15 + 1.0 + 0.2 + 0.003 + 8 * 0.0005 + 40 * 0.0005 + (40 * 41 / 2 - 32 * 33 / 2) * 0.00025
    decode = [5.0 + 1.0 + 0.2 + 0.003 + 0.0005 + seen * (0.0005 + 0.00025) for seen in (41, 42)]
    (served,) = run.served
    assert served.first == pytest.approx(2 + (chunk_32 + chunk_8) / 1000)
    assert served.last == pytest.approx(2 + (chunk_32 + chunk_8 + sum(decode)) / 1000)
    assert run.busy == pytest.approx(run.seconds - 2)
    assert (run.steps, run.pages.peak, run.waiting.peak) == (4, 2, 0)


def test_costs_are_found_in_what_steps_took() -> None:
    rng = np.random.default_rng(0)
    work, costs = rng.uniform(0, 9, (60, 5)), np.array([3.0, 0.0, 0.5, 20.0, 0.01])
    assert nonnegative_fit(work, work @ costs) == pytest.approx(costs, abs=1e-6)
    # Where the best fit has a negative cost, the best of those without: the others are fitted to what is left.
    target = work @ np.array([3.0, -1.0, 0.5, 20.0, 2.0])
    fit = nonnegative_fit(work, target)
    assert fit[1] == 0
    assert fit[[0, 2, 3, 4]] == pytest.approx(np.linalg.lstsq(work[:, [0, 2, 3, 4]], target, rcond=None)[0], abs=1e-6)


# Replays


REQUEST = st.builds(
    TraceRequest,
    at=st.floats(0, 3),
    prompt_tokens=st.integers(1, 200),
    output_tokens=st.integers(1, 60),
    tenant=st.sampled_from(["", "a", "b"]),
    priority=st.integers(-2, 2),
    conversation=st.sampled_from([None, None, "c"]),
)


@settings(max_examples=60, deadline=None)
@given(
    trace=st.lists(REQUEST, min_size=1, max_size=40),
    pages=st.integers(9, 30),  # the longest request needs 9
    max_batch_size=st.integers(1, 8),
    max_batch_tokens=st.integers(8, 64),
    policy=st.sampled_from(POLICIES),
    replicas=st.integers(1, 3),
    routing=st.sampled_from([*ROUTINGS]),
)
def test_every_request_gets_its_tokens(
    trace: list[TraceRequest],
    pages: int,
    max_batch_size: int,
    max_batch_tokens: int,
    policy: str,
    replicas: int,
    routing: str,
) -> None:
    """In an order that can be, and the same every time; in half the time if all that takes time takes half."""
    trace.sort(key=lambda request: request.at)
    config = EngineConfig(
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_tokens,
        scheduling_policy=policy,
        data_parallel_size=replicas,
    )
    run = simulate(trace, config, COSTS, pages, routing=routing)
    for request, served in zip(trace, run.served, strict=True):
        assert served.request is request and served.problem is None
        assert served.output_tokens == request.output_tokens
        assert served.first is not None and request.at < served.first <= served.last <= run.seconds
    assert 0 < run.busy <= run.seconds
    assert run.pages.peak <= pages
    assert sum(use.requests for use in run.replicas) == len(trace)
    assert times(simulate(trace, config, COSTS, pages, routing=routing)) == times(run)


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_cheaper_steps_are_sooner_done(factor: float) -> None:
    trace = poisson_trace(20.0, 200, 100, 30, seed=0)
    config = EngineConfig(max_batch_size=16, max_batch_tokens=128)
    slow, fast = (simulate(trace, config, costs, 100) for costs in (COSTS, scaled(COSTS, factor)))
    assert fast.seconds < slow.seconds
    slow_latency, fast_latency = (summarize(run)["request_latency_ms"] for run in (slow, fast))
    assert all(fast_latency[name] < slow_latency[name] for name in ("mean", "p50", "p95", "p99"))


def test_time_scales() -> None:
    """If steps take half as long and requests come twice as fast, the same happens in half the time."""
    trace = poisson_trace(20.0, 100, 100, 90, seed=0)
    sooner = [msgspec.structs.replace(request, at=request.at / 2) for request in trace]
    config = EngineConfig(max_batch_size=16, max_batch_tokens=128)
    run, halved = simulate(trace, config, COSTS, 30), simulate(sooner, config, scaled(COSTS, 0.5), 30)
    assert run.preemptions == halved.preemptions > 0
    assert [served.last for served in halved.served] == pytest.approx([served.last / 2 for served in run.served])


def test_prefixes_and_conversations_are_found() -> None:
    trace = [
        TraceRequest(at=0, prompt_tokens=100, output_tokens=20, conversation="c"),
        TraceRequest(at=9, prompt_tokens=160, output_tokens=20, conversation="c"),  # goes on with all 120 of it
        TraceRequest(at=18, prompt_tokens=100, output_tokens=1, prefix="system", prefix_tokens=64),
        TraceRequest(at=27, prompt_tokens=100, output_tokens=1, prefix="system", prefix_tokens=64),
        TraceRequest(at=36, prompt_tokens=100, output_tokens=1),
        TraceRequest(at=45, prompt_tokens=100, output_tokens=1, conversation="other"),
    ]
    run = simulate(trace, EngineConfig(), COSTS, 100)
    # Whole pages of 32, and of the conversation all that was computed: its last token was not.
    assert [served.cached_tokens for served in run.served[:2]] == [0, 119]
    assert [served.cached_tokens for served in run.served[2:]] == [0, 64, 0, 0]
    assert summarize(run)["prefix_hit_rate"] == pytest.approx((119 + 64) / 660)
    off = simulate(trace, EngineConfig(enable_prefix_caching=False), COSTS, 100)
    assert not any(served.cached_tokens for served in off.served)
    assert off.served[1].last > run.served[1].last


def test_a_turn_follows_the_end_of_the_turn_before() -> None:
    """Also of one that is refused, and not before its own time."""
    turn = {"prompt_tokens": 50, "output_tokens": 20, "conversation": "c"}
    trace = [
        TraceRequest(at=1.0, **turn),
        TraceRequest(at=0.0, **turn, think_time=2.0),
        TraceRequest(at=9.0, **turn, think_time=0.5),
        TraceRequest(at=0.0, **turn | {"conversation": "other"}, think_time=3.0),  # the first of its conversation
    ]
    run = simulate(trace, EngineConfig(), COSTS, 100)
    arrival = {trace.index(served.request): served.arrival for served in run.served}
    assert arrival == {0: 1.0, 1: run.served[1].last + 2.0, 2: 9.0, 3: 0.0}
    refused = simulate(trace[:2], EngineConfig(max_batch_size=1, max_queue=0), COSTS, 100)
    assert [served.arrival for served in refused.served] == [1.0, refused.served[0].last + 2.0]
    at_once = [TraceRequest(at=0.0, **turn | {"conversation": "other"}), msgspec.structs.replace(trace[0], at=0.0)]
    refused = simulate([*at_once, trace[1]], EngineConfig(max_batch_size=1, max_queue=0), COSTS, 100)
    assert [(served.arrival, served.problem) for served in refused.served] == [
        (0.0, None), (0.0, "the queue is full"), (2.0, None),
    ]  # fmt: skip


CONVERSATIONS = Conversations(
    requests=300,
    rate=15,
    turns=4,
    think_time=1.0,
    input_len=48,
    output_len=4,
    system_prompts=6,
    system_len=256,
    skew=1.2,
    max_len=1000,
    seed=3,
)


def test_conversations_are_as_specified(tmp_path: Path) -> None:
    trace = dataclasses.replace(CONVERSATIONS, requests=20_000).trace()
    assert len(trace) == 20_000 and all(request.prompt_tokens + request.output_tokens <= 1000 for request in trace)
    names = [request.conversation for request in trace]
    firsts = [request for i, request in enumerate(trace) if names[i - 1] != names[i]]
    assert 3 < 20_000 / len(firsts) < 4  # some end before max_len
    assert 20_000 / trace[-1].at == pytest.approx(15, rel=0.05)
    by_popularity = [sum(request.prefix == f"system{i}" for request in firsts) for i in range(6)]
    assert [count / by_popularity[0] for count in by_popularity] == pytest.approx(
        [(i + 1) ** -1.2 for i in range(6)], rel=0.15
    )
    assert np.mean([request.think_time for request in trace if request.think_time is not None]) == pytest.approx(
        1, 0.05
    )
    for request, following in itertools.pairwise(trace):
        if following.conversation == request.conversation:
            assert following.prompt_tokens > request.prompt_tokens + request.output_tokens
            assert (following.prefix, following.at) == (request.prefix, request.at)
    write_trace(tmp_path / "trace", trace)
    assert read_trace(tmp_path / "trace") == trace == dataclasses.replace(CONVERSATIONS, requests=20_000).trace()


def test_four_replicas_find_nearly_as_much_cached_as_one_engine_and_share_the_load() -> None:
    """Octavo's router does; round robin and the fewest requests find much less."""
    trace = CONVERSATIONS.trace()
    config = EngineConfig(max_batch_size=16, max_batch_tokens=256)
    one_engine = summarize(simulate(trace, config, scaled(COSTS, 0.25), 1200))["prefix_hit_rate"]
    several = dataclasses.replace(config, data_parallel_size=4)
    runs = {name: summarize(simulate(trace, several, COSTS, 300, routing=name)) for name in ROUTINGS}
    hit_rates = {name: run["prefix_hit_rate"] / one_engine for name, run in runs.items()}
    assert hit_rates["exact"] >= 0.95 and max(runs["exact"]["busiest_to_mean"].values()) <= 1.2
    assert max(hit_rates["round-robin"], hit_rates["least-loaded"]) < 0.9
    first = {name: run["time_to_first_token_ms"]["mean"] for name, run in runs.items()}
    assert first["exact"] < 0.8 * min(first["round-robin"], first["least-loaded"])


def test_pages_come_back_from_a_tier_below() -> None:
    """40 conversations in a pool that holds three, two turns each: worth it if fetching is quicker than computing."""
    trace = [
        TraceRequest(at=100.0 * turn + i, prompt_tokens=300 * (turn + 1), output_tokens=5, conversation=str(i))
        for turn in range(2)
        for i in range(40)
    ]
    config = EngineConfig(kv_disk="simulated", kv_disk_size=COSTS.page_bytes * 1000)
    runs = []
    for seconds_per_page in (0.0001, 0.003, 10.0):
        run = simulate(trace, config, msgspec.structs.replace(COSTS, seconds_per_page=seconds_per_page), 40)
        assert all(served.output_tokens == 5 for served in run.served)
        second = [served.first - served.request.at for served in run.served[40:] if served.first is not None]
        runs.append((run.pages_fetched, sum(second) / 40))
    no_tier = simulate(trace, EngineConfig(), COSTS, 40)
    without = sum(served.first - served.request.at for served in no_tier.served[40:] if served.first) / 40
    # 304 tokens of the first turn are computed when the second one comes: 9 pages of 32.
    assert [fetched for fetched, _ in runs] == [40 * 9, 40 * 9, 0]
    assert runs[0][1] + 9 * 0.0029 == pytest.approx(runs[1][1], abs=1e-9)
    assert runs[1][1] < runs[2][1] == pytest.approx(without, abs=MAX_IDLE)
    small = dataclasses.replace(config, kv_disk_size=COSTS.page_bytes * 20)
    assert simulate(trace, small, msgspec.structs.replace(COSTS, seconds_per_page=0.001), 40).pages_fetched == 0


@pytest.mark.parametrize(
    "policy, order",
    [("fcfs", [0, 1, 2, 3]), ("priority", [0, 2, 1, 3]), ("deadline", [0, 3, 1, 2]), ("fair", [0, 2, 3, 1])],
)
def test_the_policy_is_told_of_terms(policy: str, order: list[int]) -> None:
    """One at a time: the first is served at once, and the others in the order that the policy gives them."""
    terms = [{}, {}, {"priority": -1, "tenant": "b"}, {"ttft_target": 1.0, "tenant": "c"}]
    trace = [TraceRequest(at=0.001 * i, prompt_tokens=50, output_tokens=20, **each) for i, each in enumerate(terms)]
    run = simulate(trace, EngineConfig(max_batch_size=1, scheduling_policy=policy), COSTS, 100)
    assert sorted(range(4), key=lambda i: run.served[i].last) == order


def test_time_runs_out_in_virtual_time() -> None:
    trace = [TraceRequest(at=0, prompt_tokens=50, output_tokens=500, timeout=timeout) for timeout in (1.0, 1000.0)]
    run = simulate(trace, EngineConfig(), COSTS, 100)
    assert run.served[0].problem and "timeout of 1 seconds" in run.served[0].problem
    assert 0 < run.served[0].output_tokens < 500
    assert run.served[0].last < 1.02 and run.served[1].output_tokens == 500 and not run.served[1].problem


def test_what_cannot_be_served_is_counted() -> None:
    trace = [TraceRequest(at=0, prompt_tokens=length, output_tokens=5) for length in (50, 5000, 50, 50, 50)]
    run = simulate(trace, EngineConfig(max_batch_size=1, max_queue=1), COSTS, 100)
    summary = summarize(run)
    assert summary["completed"] == 1 and summary["failed"]["the queue is full"] == 3
    assert sum(summary["failed"].values()) == 4  # and one that no context holds
    assert [bool(served.problem) for served in run.served] == [False, True, True, True, True]


class Timed(ComputesAtOnce):
    """A real backend whose steps take virtual time, and which remembers what they were."""

    def __init__(self, backend: Backend, costs: CostModel, clock: VirtualClock):
        self.spec, self.page_size, self.page_bytes = backend.spec, backend.page_size, backend.page_bytes
        self.copy_page = backend.copy_page
        self.shapes: list[tuple[float, Shape]] = []
        self._backend, self._costs, self._clock = backend, costs, clock

    def step(self, batch: StepBatch) -> StepResult:
        shape = Shape.of(batch)
        self._clock.advance(self._costs.seconds(shape))
        self.shapes.append((self._clock(), shape))
        return self._backend.step(batch)


def test_the_schedule_is_that_of_a_real_engine(tiny_llama: Path) -> None:
    """Step for step: a model that computes, and none."""
    rng = np.random.default_rng(0)
    trace = [
        TraceRequest(
            at=float(at),
            prompt=rng.integers(0, 512, rng.integers(1, 150)).tolist(),
            output_tokens=int(rng.integers(1, 100)),
        )
        for at in np.cumsum(rng.exponential(0.02, 60))
    ]
    config = EngineConfig(
        model=str(tiny_llama), max_batch_size=8, max_batch_tokens=48, threads=1, kv_cache_memory="8MiB"
    )
    engine = load_engine(config, tiny_llama)
    runs = []
    for backend in (engine.backend, SimulatedBackend(COSTS, VirtualClock())):
        clock = VirtualClock()
        timed = Timed(backend, COSTS, clock)
        engine_of = assemble(config, timed, num_pages=14, max_model_len=512, clock=clock)  # type: ignore[arg-type]
        run = replay(trace, engine_of, clock.advance, max_live=1000)
        runs.append((timed.shapes, times(run), run.preemptions))
    engine.close()
    assert runs[0] == runs[1]
    assert runs[0][2] > 0
    assert max(shape.sequences for _, shape in runs[0][0]) >= 4


# Reports


def test_tenants_are_told_apart_and_targets_counted() -> None:
    trace = [
        TraceRequest(at=0, prompt_tokens=10, output_tokens=1, tenant="quick", ttft_target=0.5),
        TraceRequest(at=1, prompt_tokens=500, output_tokens=1, tenant="slow", ttft_target=0.001),
        TraceRequest(at=2, prompt_tokens=500, output_tokens=1, tenant="slow", ttft_target=0.002),
        TraceRequest(at=3, prompt_tokens=500, output_tokens=1, tenant="slow"),
    ]
    summary = summarize(simulate(trace, EngineConfig(), COSTS, 100))
    assert summary["targets_met"] == pytest.approx(1 / 3)
    quick, slow = (summary["tenants"][name] for name in ("quick", "slow"))
    assert (quick["requests"], quick["completed"]) == (1, 1)
    assert quick["time_to_first_token_ms"]["mean"] < slow["time_to_first_token_ms"]["mean"]
    assert quick["time_per_output_token_ms"] is None


@pytest.mark.parametrize(
    "replicas, offered, said",
    [
        (1, None, "served at 600 per minute"),
        (1, 5.0, "50% of what this engine sustains"),
        (1, 25.0, "900 per minute. 3 such engines"),
        (4, 25.0, "these 4 engines sustain 600 per minute: the queue grows by 900 per minute. 10 such engines"),
    ],
)
def test_the_verdict(replicas: int, offered: float | None, said: str) -> None:
    summary = {"offered_per_second": offered, "sustained_per_second": 10.0, "replicas": [{}] * replicas}
    assert said in verdict(summary)


def test_the_rate_that_is_sustained_can_be(tmp_path: Path) -> None:
    """Just below it the queue does not grow, well above it it does."""
    costs, config = tmp_path / "costs.json", EngineConfig(max_batch_size=16, max_batch_tokens=128)
    COSTS.save(costs)
    command("--requests", 400, "--cost-model", costs, "--max-batch-size", 16, "--max-batch-tokens", 128,
            "--output-json", tmp_path / "report")  # fmt: skip
    sustained = json.loads((tmp_path / "report").read_text())["sustained_per_second"]
    runs = [simulate(poisson_trace(sustained * part, 1000, 128, 128, 0), config, COSTS, 100) for part in (0.9, 1.3)]
    longest = [max(served.first - served.request.at for served in run.served if served.first) for run in runs]
    assert longest[0] < 10 < longest[1]
    assert runs[1].waiting.peak > 3 * runs[0].waiting.peak


# The command


def command(*arguments: object) -> str:
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_measure_then_simulate(tiny_llama: Path, tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    flags = ("--threads", 1, "--max-batch-size", 8, "--max-batch-tokens", 64, "--kv-cache-memory", "8MiB")
    printed = command(
        "--measure", "--model", tiny_llama, *flags, "--kv-disk", tmp_path / "pages", "--cost-model", costs
    )
    assert "Error of the model" in printed
    model = CostModel.load(costs)
    assert model.settings["model"] == str(tiny_llama) and model.settings["threads"] == 1
    assert [count for count, _ in model.rows_ms] == [1, 2, 4, 8, 9, 16, 17, 24, 32, 33, 48, 64]
    assert [count for count, _ in model.sampled_ms] == [1, 2, 4, 8]
    assert 0 < model.seconds_per_page < 0.1
    shapes = [Shape(1, 1, 1, 50, 50), Shape(8, 8, 8, 400, 400), Shape(1, 64, 1, 64, 2080)]
    seconds = [model.seconds(shape) for shape in shapes]
    assert 0 < seconds[0] < seconds[2] < 1

    trace = tmp_path / "trace"
    made = ("--rate", "600/min", "--requests", 50, "--input-len", 40, "--output-len", 8, "--write-trace", trace)
    assert command(*made) == ""
    assert len(read_trace(trace)) == 50
    report = tmp_path / "report.json"
    printed = command(trace, "--cost-model", costs, *flags, "--output-json", report)
    summary = json.loads(report.read_text())
    assert (summary["requests"], summary["completed"], summary["failed"]) == (50, 50, {})
    assert "Requests arrived at" in printed and "To first token" in printed
    sweep = ("--sweep", "pages=12,40", "--sweep", "scheduling-policy=fcfs,priority")
    printed = command(trace, "--cost-model", costs, *sweep, "--output-json", report)
    runs: list[dict[str, Any]] = json.loads(report.read_text())["runs"]
    assert [(run["pages"], run["scheduling_policy"]) for run in runs] == [
        ("12", "fcfs"), ("12", "priority"), ("40", "fcfs"), ("40", "priority"),
    ]  # fmt: skip
    assert [run["num_pages"] for run in runs] == [12, 12, 40, 40]
    assert printed.count("fcfs") == 2


def test_replicas_are_simulated(tmp_path: Path) -> None:
    costs, trace, report = tmp_path / "costs", tmp_path / "trace", tmp_path / "report"
    COSTS.save(costs)
    made = ("--turns", 3, "--requests", 40, "--rate", 20, "--input-len", 30, "--output-len", 4, "--system-prompts", 2,
            "--system-len", 100, "--skew", 1.5, "--think-time", 0.5, "--write-trace", trace)  # fmt: skip
    assert command(*made) == ""
    assert len(read_trace(trace)) == 40
    printed = command(trace, "--cost-model", costs, "--data-parallel-size", 4, "--output-json", report)
    assert "Busiest replica / mean: tokens computed" in printed and "Seconds with a step running" in printed
    replicas = json.loads(report.read_text())["replicas"]
    assert len(replicas) == 4 and sum(replica["requests"] for replica in replicas) == 40
    sweep = ("--sweep", "routing=exact,round-robin,least-loaded", "--sweep", "data_parallel_size=1,4")
    printed = command(trace, "--cost-model", costs, *sweep, "--output-json", report)
    runs = json.loads(report.read_text())["runs"]
    assert [len(run["replicas"]) for run in runs] == [1, 4] * 3
    assert "Busiest" in printed and printed.count("round-robin") == 2


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--rate", "5"], "--cost-model FILE"),
        (["--measure"], "--cost-model FILE"),
        (["TRACE", "--rate", "5", "--cost-model", "COSTS"], "leave out"),
        (["TRACE", "--cost-model", "TRACE"], "not a cost model"),
        (["TRACE", "--cost-model", "missing"], "cannot read missing"),
        (["TRACE", "--cost-model", "COSTS", "--quantization", "4bit"], "measured with quantization 8bit"),
        (["TRACE", "--cost-model", "COSTS", "--speculative-tokens", "4"], "speculative_tokens"),
        (["TRACE", "--cost-model", "COSTS", "--kv-disk", "folder"], "measure again with --kv-disk"),
        (["TRACE", "--cost-model", "COSTS", "--sweep", "quantization=8bit,4bit"], "quantization 8bit"),
        (["--measure", "--cost-model", "no/folder/costs"], "no such folder"),
        (["TRACE", "--cost-model", "COSTS", "--sweep", "pages"], "--sweep must be"),
        (["TRACE", "--cost-model", "COSTS", "--sweep", "pages=x"], "pages must be"),
        (["TRACE", "--cost-model", "COSTS", "--sweep", "page=1"], "unknown setting 'page'"),
        (["TRACE", "--cost-model", "COSTS", "--routing", "random"], "exact, round-robin, least-loaded, not 'random'"),
        (["TRACE", "--cost-model", "COSTS", "--turns", "3"], "leave out"),
        (["TRACE", "--cost-model", "COSTS", "--sweep", "max_batch_size=many"], "max_batch_size must be an integer"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    files = {"TRACE": tmp_path / "trace", "COSTS": tmp_path / "costs"}
    write_trace(files["TRACE"], poisson_trace(None, 2, 10, 2, 0))
    COSTS.save(files["COSTS"])
    given = [str(files.get(argument, argument)) for argument in arguments]
    done = subprocess.run([*COMMAND, *given], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"octavo: [^\n]+\n", done.stderr), done.stderr
    assert complaint in done.stderr
