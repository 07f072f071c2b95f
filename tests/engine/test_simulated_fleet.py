"""Simulated fleets: nothing is lost or counted twice, whatever fails; and skipping ahead changes no result."""

import dataclasses
import heapq
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.cli import main
from octavo.config import POLICIES, EngineConfig
from octavo.errors import ConfigError
from octavo.frontend.live import LiveRequest
from octavo.frontend.router import Load
from octavo.simulation.conversations import Conversations
from octavo.simulation.fleet.autoscaling import CALM, PERIOD, Autoscaling
from octavo.simulation.fleet.cell import Cell, CellReplica, Event
from octavo.simulation.fleet.engine import Stretch
from octavo.simulation.fleet.faults import SILENCE, Fault, Faults, parse_faults
from octavo.simulation.fleet.fleet import Fleet, Scaling
from octavo.simulation.fleet.load import GeneratedLoad, RecordedLoad
from octavo.simulation.fleet.plan import Goal, best, capacity, fewest_engines, guess
from octavo.simulation.fleet.record import Done, Requests, Use
from octavo.simulation.fleet.report import summarize
from octavo.simulation.replay import simulate
from octavo.simulation.trace import TraceRequest, poisson_trace, write_trace
from simulated_costs import COSTS

CONFIG = EngineConfig(max_batch_size=8, max_batch_tokens=128)
CONVERSATIONS = Conversations(
    requests=200, rate=10, turns=4, think_time=1.0, input_len=48, output_len=24, system_prompts=6, system_len=128,
    skew=1.2, max_len=900, seed=3,
)  # fmt: skip
REQUEST = st.builds(
    TraceRequest,
    at=st.floats(0, 3),
    prompt_tokens=st.integers(1, 200),
    output_tokens=st.integers(1, 60),
    tenant=st.sampled_from(["", "a", "b"]),
    priority=st.integers(-2, 2),
    conversation=st.sampled_from([None, None, "c", "d"]),
    think_time=st.just(None),
)


def run(cell: Cell) -> tuple[Requests, Use]:
    """Run a cell, and count beside it what it must report: requests sent, engines that come and go, and their time."""
    sent, ended = Counter[str](), dict[Load, float]()
    send, remove = cell.send, cell.placement.router.remove

    def count_send(replica: CellReplica, live: LiveRequest) -> None:
        sent[live.id] += 1
        send(replica, live)

    def count_remove(load: Load) -> None:
        assert load not in ended
        ended[load] = cell.now
        remove(load)

    cell.send, cell.placement.router.remove = count_send, count_remove  # type: ignore[method-assign]
    engines = cell.use.engines
    requests, use = cell.run()
    again = sum(sent.values()) - len(sent) - use.moves - use.resumed
    assert again == 0 or (again > 0 and cell._faults.rates)  # readmission sends suspects again
    assert use.scale_outs == len(cell._all) - engines
    assert use.scale_ins == sum(replica.is_leaving for replica in cell._all)
    seconds = sum(ended.get(replica.load, cell.now) - replica.added for replica in cell._all)
    assert use.engine_seconds == pytest.approx(seconds)
    return requests, use


def times(trace: list[TraceRequest], cell: Cell) -> np.ndarray:
    requests, _ = run(cell)
    assert list(requests.ends) == [1] * len(trace) and not requests.problems
    return np.array([requests.first, requests.last, requests.cached])


@settings(max_examples=25, deadline=None)
@given(
    trace=st.lists(REQUEST, min_size=1, max_size=40),
    pages=st.integers(9, 30),  # the longest request needs 9
    max_batch_size=st.integers(1, 8),
    max_batch_tokens=st.integers(8, 64),
    policy=st.sampled_from(POLICIES),
)
def test_one_engine_is_as_in_the_simulation_of_one_engine(
    trace: list[TraceRequest], pages: int, max_batch_size: int, max_batch_tokens: int, policy: str
) -> None:
    trace.sort(key=lambda request: request.at)
    config = EngineConfig(max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens, scheduling_policy=policy)
    cell = Cell(trace, config, COSTS, pages, engines=1)
    single = simulate(trace, config, COSTS, pages)
    expected = np.array([(served.first, served.last, served.cached_tokens) for served in single.served]).T
    assert times(trace, cell) == pytest.approx(expected, abs=1e-9)
    assert (cell.use.steps, cell.use.preemptions) == (single.steps, single.preemptions)


@pytest.mark.parametrize("pages, rate, caches", [(60, 10, True), (200, 100, True), (30, 60, False)])
def test_several_engines_are_as_in_the_simulation_of_single_steps(pages: int, rate: float, caches: bool) -> None:
    """With a router and, under the higher rates, moves to idle engines; preemptions where pages are few.

    Those without caches, since the router learns of evicted pages at the end of a stretch only.
    """
    config = dataclasses.replace(CONFIG, enable_prefix_caching=caches)
    trace = dataclasses.replace(CONVERSATIONS, rate=rate).trace()
    single = simulate(trace, dataclasses.replace(config, data_parallel_size=3), COSTS, pages)
    index = {id(request): i for i, request in enumerate(trace)}
    served = sorted(single.served, key=lambda each: index[id(each.request)])
    expected = np.array([(each.first, each.last, each.cached_tokens) for each in served]).T
    cell = Cell(trace, config, COSTS, pages, engines=3)
    assert times(trace, cell) == pytest.approx(expected, abs=1e-9)
    assert (cell.use.steps, cell.use.moves) == (single.steps, single.moves)
    assert cell.use.preemptions == single.preemptions
    assert (single.moves > 0, single.preemptions > 0) == (rate > 50, pages < 50)


@settings(max_examples=25, deadline=None)
@given(
    trace=st.lists(REQUEST, min_size=1, max_size=60),
    engines=st.integers(1, 4),
    rates=st.dictionaries(st.sampled_from([*Fault]), st.floats(0.05, 3.0), min_size=1),
    start_seconds=st.floats(0, 5),
    more=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_whatever_fails_every_request_ends_once_with_all_its_tokens(
    trace: list[TraceRequest],
    engines: int,
    rates: dict[Fault, float],
    start_seconds: float,
    more: int,
    seed: int,
) -> None:
    """The same in a second run. A request fails only if its engines were lost too often, as in a real fleet."""
    runs = []
    for _ in range(2):
        scaling = Autoscaling(engines, engines + more, 50.0)
        cell = Cell(trace, CONFIG, COSTS, 60, engines, start_seconds, Faults(rates, seed), scaling)
        requests, use = run(cell)
        assert list(requests.ends) == [1] * len(trace)
        assert set(requests.problems.values()) <= {"its engines were lost too often"}
        for i, request in enumerate(trace):
            if i not in requests.problems:
                assert request.at < requests.first[i] <= requests.last[i] <= cell.now
        assert not cell._live and not cell.placement.waiting
        for replica in cell.replicas:
            assert replica.load.completions == replica.load.queued_tokens == 0
            if replica.engine is not None and replica.is_reachable:
                pool = replica.engine.kv.pool
                assert pool.num_available == pool.num_pages
        runs.append((list(requests.first), list(requests.last), vars(use)))
    assert str(runs[0]) == str(runs[1])  # as text, since NaN is not equal to itself


def on_the_first(fault: Fault) -> Faults:
    """Faults of which one comes to the first of two engines after 0.1 to 0.4 seconds, and the next after 4 or more."""
    for seed in range(10_000):
        faults = Faults({fault: 0.2}, seed)
        first, second = faults.of_engine(0, 0), faults.of_engine(1, 0)
        if 0.1 < next(first)[0] < 0.4 and next(first)[0] > 4 and next(second)[0] > 4:
            return faults
    raise AssertionError("no seed has such faults")


def test_a_killed_engine_s_request_goes_on_where_it_stopped() -> None:
    """It takes as long as without the kill, and the time to compute prompt and output so far on the other engine."""
    trace = [TraceRequest(at=0.0, prompt_tokens=64, output_tokens=100)]
    undisturbed = times(trace, Cell(trace, CONFIG, COSTS, 60, engines=2))
    cell = Cell(trace, CONFIG, COSTS, 60, engines=2, start_seconds=1000.0, faults=on_the_first(Fault.KILL))
    requests, use = run(cell)
    assert use.resumed == 1 and use.faults == {"kill": 1}
    assert requests.first[0] == undisturbed[0][0]
    lost = requests.last[0] - undisturbed[1][0]
    assert 0 < lost < 0.1  # a step of some 100 rows, and the step that was lost


def test_a_silent_engine_is_noticed_after_a_while() -> None:
    trace = [TraceRequest(at=0.0, prompt_tokens=64, output_tokens=100)]
    last = {}
    for fault in (Fault.KILL, Fault.SUSPEND, Fault.PARTITION):
        faults = on_the_first(fault)
        requests, use = run(Cell(trace, CONFIG, COSTS, 60, engines=2, start_seconds=1000.0, faults=faults))
        assert use.resumed == 1
        last[fault] = requests.last[0]
    assert last[Fault.SUSPEND] == pytest.approx(last[Fault.KILL] + SILENCE, abs=0.1)
    assert last[Fault.PARTITION] == pytest.approx(last[Fault.SUSPEND])


def test_slow_engines_get_less() -> None:
    trace = poisson_trace(30.0, 600, 100, 20, seed=0)
    usual, slow = (
        Cell(trace, CONFIG, COSTS, 100, engines=3, faults=faults).run()[0]
        for faults in (None, Faults({Fault.SLOW: 1 / 20}, seed=2))
    )
    assert np.mean(slow.last) > np.mean(usual.last)


def test_every_fault_of_every_cell_counts() -> None:
    """Slow spells, which no other fault can prevent."""
    faults = Faults({Fault.SLOW: 1 / 5}, seed=1)
    whole = fleet(frontends=2, faults=faults)
    load = RecordedLoad(poisson_trace(20.0, 600, 100, 20, seed=0))
    cells = [whole._cell(load.cell(number, 2), number).run()[1] for number in range(2)]
    for number, use in enumerate(cells):
        times = (at for engine in range(2) for at, _ in itertools.islice(faults.of_engine(engine, number), 100))
        assert use.faults == {"slow": sum(at <= use.seconds for at in times)}
    assert whole.simulate(load).use.faults == cells[0].faults + cells[1].faults
    assert cells[0].faults != cells[1].faults


def test_a_stretch_ends_with_the_step_that_runs() -> None:
    for growth in (0.0, 1e-18, 0.001, 0.5):
        stretch = Stretch([], 2.0, 0.1, growth, 20)
        ends = [2.0 + stretch.seconds(steps) for steps in range(1, 21)]
        assert stretch.steps_before(2.0) == 1
        for i, end in enumerate(ends):
            assert stretch.steps_before(end) == i + 1  # what happens at its end, is before the next step
            assert stretch.steps_before(math.nextafter(end, 99)) <= min(i + 2, 20)
            assert stretch.steps_before(end + 0.01) == min(i + 2, 20)


def test_an_engine_that_skips_ahead_stops_for_another_one_s_queue() -> None:
    """So that it takes a request from there after its current step, as a real engine does."""
    trace = [TraceRequest(at=0.0, prompt_tokens=10, output_tokens=200)]
    cell = Cell(trace, CONFIG, COSTS, 60, engines=2)
    cell._arrive()
    idle, busy = sorted(cell.replicas, key=lambda replica: replica.load.completions)
    while not busy.engine or not busy.engine.is_skipping:
        time, event, number, turn = heapq.heappop(cell._events)
        cell._handle(time, Event(event), number, turn)
    ends_at = busy.engine.ends_at
    for queued in (20, 1000):  # tokens of two requests each
        for live in (cell._live_request(0, trace[0], [1] * 10) for _ in range(2)):
            idle.load.add(live, queued, 0)
        cell._offer(idle.load)
        assert (busy.engine.ends_at < ends_at) == (queued == 1000)


# Fleets


def fleet(**changes: object) -> Fleet:
    return dataclasses.replace(Fleet(config=CONFIG, costs=COSTS, pages=100, engines=4), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"frontends": 5}, "fewer --frontends"),
        ({"frontends": 2, "cells": 3}, "--cells must be at most the number of frontends, 2, not 3"),
        ({"scaling": Scaling(most=3, target=100.0)}, "--max-engines must be at least"),
        ({"config": dataclasses.replace(CONFIG, kv_disk="folder")}, "no tiers"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        fleet(**changes)


def test_frontends_divide_a_trace() -> None:
    load = RecordedLoad(CONVERSATIONS.trace())
    cells = [load.cell(number, 3) for number in range(3)]
    assert sorted(map(str, itertools.chain(*cells))) == sorted(map(str, load.trace))
    names = [{request.conversation for request in cell} for cell in cells]
    assert names[0] and not names[0] & names[1] and not names[1] & names[2]
    done = fleet(frontends=3).simulate(load)
    assert len(done.arrival) == load.requests and done.use.engines == 4
    one = fleet(frontends=1).simulate(load)
    assert np.sort(one.prompt).tolist() == np.sort(done.prompt).tolist()


def test_some_of_the_frontends_stand_for_all() -> None:
    """Within the noise of a sample: 2 of 8 cells, beside all of them."""
    conversations = dataclasses.replace(CONVERSATIONS, requests=8 * 400, rate=8 * 5.0)
    whole = fleet(engines=16, frontends=8, until=80.0)
    parts = dataclasses.replace(whole, cells=2)
    figures = []
    for each in (whole, parts):
        done = each.simulate(GeneratedLoad(conversations))
        figures.append(summarize(done, each, price=2.0))
    for name in ("requests_per_second", "output_tokens_per_second", "prefix_hit_rate", "engine_hours", "cost"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=0.15), name
    first, sampled = (each["time_to_first_token_ms"] for each in figures)
    assert sampled["p50"] == pytest.approx(first["p50"], rel=0.1)
    assert figures[0]["frontends_simulated"] == 8 and figures[1]["frontends_simulated"] == 2
    assert figures[0]["engines_mean"] == pytest.approx(16)
    assert figures[0]["cost"] == pytest.approx(2.0 * 16 * figures[0]["duration_seconds"] / 3600, rel=0.05)


def test_a_plan_has_the_fewest_engines_that_meet_the_goal() -> None:
    load = GeneratedLoad(dataclasses.replace(CONVERSATIONS, requests=600, rate=15.0))
    goal = Goal(first=400, per_token=25, percentile=90)
    whole = fleet(until=40.0)
    found = best(fewest_engines(whole, 1, None, load, goal, *guess(whole, load)))
    assert found.is_met and 100 * goal.share(found.done) >= 90
    fewer = dataclasses.replace(whole, engines=found.fleet.engines - 1).simulate(load)
    assert not goal.is_met(fewer)
    assert best(fewest_engines(whole, 1, None, load, Goal(first=1e9, per_token=None), 1)).fleet.engines == 1


def test_what_an_engine_could_serve_is_what_it_serves_when_all_comes_at_once() -> None:
    """Its batch is full nearly all the time."""
    whole = fleet(engines=1)
    done = whole.simulate(RecordedLoad(poisson_trace(None, 400, 100, 60, seed=0)))
    assert capacity(done, whole) == pytest.approx(400 / done.use.seconds, rel=0.1)


def test_failed_requests_do_not_meet_a_goal() -> None:
    tokens = np.array([1, 11, 11])
    done = Done(
        1, arrival=np.zeros(3), first=np.ones(3), last=np.ones(3) * 2, output=tokens, prompt=tokens, cached=tokens
    )
    done.problems["the queue is full"] = 1
    assert Goal(first=1000, per_token=100).share(done) == 0.75
    assert Goal(first=999, per_token=None).share(done) == 0
    assert Goal(first=None, per_token=99).share(done) == 0.25  # a single token has no time per further token


def test_engines_are_added_while_there_is_a_queue_and_drained_when_it_is_gone() -> None:
    early = poisson_trace(30.0, 1500, 100, 20, seed=0)
    late = [TraceRequest(at=60.0 + 2 * i, prompt_tokens=50, output_tokens=200) for i in range(400)]
    trace = [*early, *late]
    requests, use = run(Cell(trace, CONFIG, COSTS, 100, 1, start_seconds=10.0, autoscaling=Autoscaling(1, 5, 200.0)))
    alone, _ = run(Cell(trace, CONFIG, COSTS, 100, 1))
    assert use.scale_outs >= 2 and use.scale_ins >= 1 and use.most_engines <= 5
    assert use.resumed >= 1, "drained engines had requests"
    assert list(requests.ends) == [1] * len(trace) and not requests.problems
    waits = [np.percentile(np.array(each.first) - np.array(each.arrival), 95) for each in (requests, alone)]
    assert waits[0] < waits[1] / 2
    assert use.seconds < use.engine_seconds < 5 * use.seconds


def test_an_autoscaler_waits_before_it_drains() -> None:
    scaling = Autoscaling(fewest=2, most=6, target=100)
    assert scaling.decide(0.0, 2, 100 * 2 * 1.05) == 2  # within the tolerance
    assert scaling.decide(PERIOD, 2, 700) == 6  # not 7
    assert scaling.decide(2 * PERIOD, 6, 0) == 6
    assert scaling.decide(PERIOD + CALM - 1, 6, 0) == 6
    assert scaling.decide(PERIOD + CALM, 6, 0) == 2


def test_faults_are_random_at_their_rates() -> None:
    faults = parse_faults("kill=1/hour, slow=3/hour", seed=5)
    assert faults.rates == pytest.approx({Fault.KILL: 1 / 3600, Fault.SLOW: 3 / 3600})
    events = [event for _, event in zip(range(4000), faults.of_engine(0, 0), strict=False)]
    assert events[-1][0] / 4000 == pytest.approx(900, rel=0.1)
    assert sum(fault is Fault.SLOW for _, fault in events) / 4000 == pytest.approx(0.75, rel=0.1)
    assert next(faults.of_engine(0, 0)) == events[0] != next(faults.of_engine(1, 0)) != next(faults.of_engine(0, 1))
    for bad in ("", "kill", "kill=", "boom=1/day", "kill=0/day", "kill=1/fortnight"):
        with pytest.raises(ConfigError):
            parse_faults(bad)


# The command


@pytest.fixture
def octavo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process; test_simulate.py runs real ones."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["octavo", "simulate", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        return cast(int, exit.value.code), *capsys.readouterr()

    return run


def test_the_command_simulates_a_fleet_and_plans_one(octavo: Callable[..., Any], tmp_path: Path) -> None:
    costs, trace = tmp_path / "costs.json", tmp_path / "trace.jsonl"
    COSTS.save(costs)
    write_trace(trace, dataclasses.replace(CONVERSATIONS, rate=4).trace())
    replay = ("--engines", "4", "--frontends", "2", "--trace", str(trace), "--cost-model", str(costs), "--price", "2")
    code, out, err = octavo(*replay, "--faults", "kill=1/day", "--output-json", str(tmp_path / "out.json"))
    assert code == 0, err
    assert "What saturates first: " in out and "2 of 2" in out and "Cost" in out
    assert '"cost_per_million_output_tokens"' in (tmp_path / "out.json").read_text()
    load = ("--rate", "120/min", "--minutes", "0.5", "--cost-model", str(costs), "--faults", "kill=20/hour")
    code, out, err = octavo(*load, "--ttft-ms", "1000")
    assert code == 0 and "engines meet the goal: first token within 1,000 ms" in out, err
    assert "Spare engines for these faults: " in out
    code, out, _ = octavo(*load, "--engines", "1", "--ttft-ms", "1")
    assert code == 1 and "do not meet the goal" in out


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--frontends", "2"], "--frontends needs a fleet"),
        (["--engines", "2", "--faults", "boom=1/day"], "kill, suspend, partition, slow"),
        (["--engines", "2", "--minutes", "3"], "--minutes needs --rate"),
        (["--ttft-ms", "9", "--max-engines", "3"], "--max-engines needs --engines"),
        (["--engines", "2", "--trace", "/nowhere"], "cannot read /nowhere"),
        (["a.jsonl", "--trace", "b.jsonl"], "two traces are given"),
        (["--engines", "2", "--data-parallel-size", "2"], "do not go with a fleet"),
        (["--engines", "2", "--kv-store", "redis://h"], "leave out kv_store"),
    ],
)
def test_mistakes_are_told_in_one_line(
    octavo: Callable[..., Any], tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    costs = tmp_path / "costs.json"
    COSTS.save(costs)
    code, _, err = octavo(*arguments, "--cost-model", str(costs))
    assert code == 2 and complaint in err and len(err.splitlines()) == 1, err
