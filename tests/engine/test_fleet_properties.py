"""A frontend over toy engines under random kills, hangs, drains, reloads, late messages and aborts.

A model knows every right token, and which requests are owed what. Each token must be delivered exactly once, in order.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from octavo.config import ROLES
from octavo.errors import InvalidRequest, OctavoError, RequestFailed, RequestTimeout
from octavo.frontend.live import LiveRequest
from octavo.frontend.readmission import ENOUGH_FAULTS, ENOUGH_KILLS
from octavo.frontend.replica import Replica
from octavo.outputs import RequestOutput
from octavo.params import SamplingParams
from toy_engine import POISON_DECODE, POISONS, UNSENDABLE, Expected, ToyEngine, Toys, expected, toy_request
from virtual_time import VirtualLoop, check_no_task_is_left, virtual_loop

PREFIXES = [[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5], [2] * 13]
MAX_KILLS = ENOUGH_KILLS - 2  # fewer than those after which a request fails that had no progress
MAX_LIVE = 16

turns = st.integers(0, 4)  # iterations of the event loop after an action
which = st.integers(0, 7)  # picks one of what there is
roles = st.lists(st.sampled_from(ROLES), min_size=1, max_size=4)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a request."""

    first: int | None
    rest: list[int]
    n: int
    max_tokens: int
    seed: int
    stop: Any
    tenant: str
    timeout: float | None
    raises_after: int | None  # increments after which the sink raises
    aborts: int | None  # another request, which the sink aborts


arguments = st.builds(
    Arguments,
    first=st.sampled_from([None] * 10 + [*POISONS, UNSENDABLE]),
    rest=st.builds(list.__add__, st.sampled_from(PREFIXES), st.lists(st.integers(1, 8), min_size=1, max_size=9)),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    max_tokens=st.integers(1, 24),
    seed=st.integers(0, 2**20),
    stop=st.sampled_from([None, None, None, "a", ["ab", "c"]]),
    tenant=st.sampled_from(["default", "other"]),
    timeout=st.sampled_from([None] * 15 + [0.2, 3.0]),
    raises_after=st.sampled_from([None] * 15 + [1, 3]),
    aborts=st.sampled_from([None] * 15 + [0, 1, 2, 3]),
)


@dataclass(eq=False)
class Owed:
    """What one request is owed, and what it got."""

    prompt: list[int]
    params: SamplingParams
    problems: list[str]
    timeout: float | None
    arrival: float
    raises_after: int | None
    aborts: "Owed | None"
    live: LiveRequest | None = None
    end: str | Exception | None = None  # "finished", "aborted", "raised", or the error
    got: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    increments: int = 0

    @property
    def is_poison(self) -> bool:
        return self.prompt[0] in POISONS

    def expected(self, index: int) -> Expected:
        return expected(self.prompt, self.params, index)

    def take(self, output: RequestOutput | Exception, abort: Callable[["Owed"], None]) -> None:
        """Check an increment. Called by the sink."""
        if self.end is not None:
            self.problem(f"{output!r} after its end, {self.end!r}")
        elif isinstance(output, Exception):
            self.end = output
        else:
            self.increments += 1
            for part in output.outputs:
                got = self.got.setdefault(part.index, [])
                got += part.token_ids
                self.text[part.index] = self.text.get(part.index, "") + part.text
                right = self.expected(part.index)
                if got != right.tokens[: len(got)] or part.index in self.reasons or not part.token_ids:
                    self.problem(f"completion {part.index} got {got}, not {right.tokens}")
                if part.finish_reason:
                    self.reasons[part.index] = part.finish_reason
                    if (got, self.text[part.index], part.finish_reason) != (
                        right.tokens,
                        right.text,
                        right.finish_reason,
                    ):
                        self.problem(f"completion {part.index} ended with {got}, {part}, not {right}")
            if output.finished:
                self.end = "finished"
                if len(self.reasons) != self.params.n:
                    self.problem("finished too early")
        if self.aborts is not None:
            abort(self.aborts)
        if self.increments == self.raises_after and not isinstance(output, Exception):
            self.end = self.end or "raised"
            raise RuntimeError("a sink fails")

    def sink(self, _: LiveRequest, output: RequestOutput | Exception) -> None:
        self.take(output, lambda _: None)

    def check_failure(self, now: float) -> None:
        """Check that a request has failed only for a reason of its own."""
        if isinstance(self.end, RequestTimeout):
            assert self.timeout is not None and now >= self.arrival + self.timeout
        elif isinstance(self.end, InvalidRequest):
            assert self.prompt[0] == UNSENDABLE
        elif isinstance(self.end, Exception):
            assert isinstance(self.end, RequestFailed) and self.is_poison, self.end

    def problem(self, text: str) -> None:
        self.problems.append(f"request {self.prompt}: {text}")


class Fleet(RuleBasedStateMachine):
    """Replicas of toy engines, and what their requests are owed."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.owed: list[Owed] = []
        self.tasks: list[asyncio.Task[Any]] = []  # drains, stops and starts
        self.kills = self.reloads = 0
        self.loop_context = virtual_loop()
        self.loop = self.loop_context.__enter__()

    @initialize(replicas=st.integers(1, 4), poisons=st.booleans(), roles=roles)
    def start(self, replicas: int, poisons: bool, roles: list[str]) -> None:
        self.may_poison = poisons
        self.toys = Toys(replicas, roles)
        self.frontend = self.toys.frontend
        self.run(0, self.toys.start())
        self.is_started = True

    def run(self, turns: int, coroutine: Any = None) -> None:
        """Run a coroutine, then some iterations of the loop."""

        async def main() -> None:
            if coroutine is not None:
                await coroutine
            for _ in range(turns):
                await asyncio.sleep(0)

        self.loop.run_until_complete(main())

    def act(self, turns: int, action: Callable[[], Any]) -> None:
        """Call a function on the loop, then run some iterations."""

        async def call() -> None:
            action()

        self.run(turns, call())

    def spawn(self, turns: int, coroutine: Any) -> None:
        async def spawn() -> None:
            self.tasks.append(asyncio.ensure_future(coroutine))

        self.run(turns, spawn())

    @property
    def live(self) -> list[Owed]:
        return [owed for owed in self.owed if owed.end is None]

    def engine(self, which: int) -> ToyEngine | None:
        running = self.toys.running
        return running[which % len(running)] if running else None

    # Requests

    @precondition(lambda self: len(self.live) < MAX_LIVE)
    @rule(arguments=st.lists(arguments, min_size=1, max_size=4), turns=turns)
    def submit(self, arguments: list[Arguments], turns: int) -> None:
        for one in arguments:
            self.act(turns, lambda one=one: self._submit(one))  # type: ignore[misc]

    def _submit(self, one: Arguments) -> None:
        first = None if one.first in POISONS and not self.may_poison else one.first
        prompt = ([] if first is None else [first]) + one.rest
        n = 1 if first == POISON_DECODE else one.n  # a trial is over when the completions have two tokens together
        params = SamplingParams(n=n, max_tokens=one.max_tokens, seed=one.seed, stop=one.stop)
        victim = self.live[one.aborts % len(self.live)] if one.aborts is not None and self.live else None
        owed = Owed(prompt, params, self.problems, one.timeout, self.loop.now, one.raises_after, victim)
        request = toy_request(prompt, params, tenant=one.tenant, timeout=one.timeout)
        self.owed.append(owed)
        (owed.live,) = self.frontend.submit([request], [prompt], lambda _, output: owed.take(output, self._abort))

    @precondition(lambda self: self.live)
    @rule(which=which, turns=turns)
    def abort(self, which: int, turns: int) -> None:
        owed = self.live[which % len(self.live)]
        self.act(turns, lambda: self._abort(owed))

    def _abort(self, owed: Owed) -> None:
        if owed.end is None and owed.live is not None:
            owed.end = "aborted"
            self.frontend.abort([owed.live])

    # Engines

    @rule(which=which, turns=turns, count=st.integers(1, 6))
    def step(self, which: int, turns: int, count: int) -> None:
        if engine := self.engine(which):
            for _ in range(count):
                self.act(turns, engine.step)

    @rule(turns=turns, count=st.integers(1, 6))
    def step_all(self, turns: int, count: int) -> None:
        for _ in range(count):
            for engine in self.toys.running:
                self.act(turns, engine.step)

    @rule(count=st.integers(1, 20))
    def serve(self, count: int) -> None:
        """Step all engines, as fast as real ones."""

        async def serve() -> None:
            for _ in range(count):
                for engine in self.toys.running:
                    engine.step()
                    await asyncio.sleep(0)
                await asyncio.sleep(0.05)

        self.run(0, serve())

    @rule(which=which, turns=turns)
    def begin(self, which: int, turns: int) -> None:
        if engine := self.engine(which):
            self.act(turns, engine.begin)

    @rule(which=which, turns=turns, what=st.sampled_from(["hold back", "release", "lose pages"]))
    def deliver(self, which: int, turns: int, what: str) -> None:
        """Change how an engine's messages are delivered."""
        if (engine := self.engine(which)) is None:
            return
        if what == "hold back":
            engine.holds_back = True
        elif what == "lose pages":
            engine.loses_pages = 1
        else:
            self.act(turns, engine.release)

    @precondition(lambda self: self.kills < MAX_KILLS and self.is_started)
    @rule(which=which, turns=turns, how=st.sampled_from(["kill", "kill", "hang", "kill with its messages"]))
    def kill(self, which: int, turns: int, how: str) -> None:
        if engine := self.engine(which):
            self.kills += 1
            engine.hangs = how == "hang"
            if not engine.hangs:
                self.act(turns, lambda: engine.die(loses_messages=how != "kill"))

    @rule(number=st.integers(0, 3), refuses=st.booleans())
    def next_does_not_load(self, number: int, refuses: bool) -> None:
        """The next engine of a replica, or the one after it, fails to load or belongs to other files."""
        plan = {"refuses": True} if refuses else {"fingerprint": "another"}
        if not any(not task.done() for task in self.tasks):  # `start` gives up after the first failure
            self.toys.plans[number] = [plan]

    @rule(seconds=st.sampled_from([0.011, 0.6, 3.0]))
    def wait(self, seconds: float) -> None:
        self.run(0, asyncio.sleep(seconds))

    # Drains and reloads

    @precondition(lambda self: len(self.frontend.replicas) > 1 and self.is_started)
    @rule(which=which, turns=turns)
    def drain(self, which: int, turns: int) -> None:
        replicas = self.frontend.replicas
        self.spawn(turns, self.frontend.drain(replicas[which % len(replicas)]))

    @precondition(lambda self: self.reloads < 3 and self.frontend.replicas and all(task.done() for task in self.tasks))
    @rule(turns=turns)
    def stop(self, turns: int) -> None:
        self.reloads += 1
        self.spawn(turns, self.frontend.stop())

    @precondition(lambda self: not self.frontend.replicas and all(task.done() for task in self.tasks))
    @rule(turns=turns, then_stop=st.booleans(), seconds=st.sampled_from([0.0, 0.3, 0.5, 0.51]))
    def start_again(self, turns: int, then_stop: bool, seconds: float) -> None:
        self.toys.plans.clear()

        self.is_started = False

        async def start() -> None:
            try:
                await self.toys.start()
            except OctavoError as error:
                if not then_stop and not self.toys.plans:
                    self.problems.append(f"does not start again: {error}")
            self.is_started = True

        self.spawn(turns, start())
        if then_stop:
            self.run(0, asyncio.sleep(seconds))
            self.spawn(turns, self.frontend.stop())

    # What must hold

    @invariant()
    def holds(self) -> None:
        assert not self.problems, self.problems
        for owed in self.owed:
            owed.check_failure(self.loop.now)
        for replica in self.frontend.replicas if hasattr(self, "frontend") else ():
            check_load(self.frontend, replica)
            check_engine(self.frontend, replica)

    def teardown(self) -> None:
        try:
            if hasattr(self, "frontend"):
                self.end()
                self.loop_context.__exit__(None, None, None)
        except BaseException as error:
            self.loop_context.__exit__(type(error), error, error.__traceback__)
            raise

    def end(self) -> None:
        """Let all requests end, and check that nothing is left of them."""
        self.toys.plans.clear()

        async def end() -> None:
            await self.until(lambda: all(task.done() for task in self.tasks))
            if not self.frontend.replicas:
                await self.toys.start()
            await self.toys.finish()
            await self.until(lambda: all(self.is_well(replica) for replica in self.frontend.replicas))
            for task in self.tasks:
                task.result()

        self.run(0, end())
        self.holds()
        for owed in self.owed:
            assert owed.end is not None, owed
            if owed.is_poison:
                assert owed.end != "finished" or owed.params.max_tokens == 1 or owed.prompt[0] == POISON_DECODE
        frontend = self.frontend
        ledger = frontend._ledger
        assert ledger is not None and not len(ledger) and not ledger.num_completions
        assert not ledger._completions and not ledger._deadlines._at and not frontend.placement.waiting
        assert not frontend._calls._waiting
        for replica in frontend.replicas:
            readmission, load, engine = replica.readmission, replica.load, self.toys.engine(replica)
            assert not (readmission._suspects or readmission._last or readmission._trial)
            assert not (load.unstarted or load.queued_tokens or load.completions)
            assert not engine.sequences
            assert engine.published is None or load.pages == engine.published
        running = {id(engine) for engine in self.toys.running}
        assert running == {id(self.toys.engine(replica)) for replica in frontend.replicas}
        self.run(0, frontend.close())
        assert not self.toys.running
        check_no_task_is_left(self.loop)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Step all engines until a condition holds."""
        for _ in range(1000):
            if condition():
                return
            for engine in self.toys.running:
                engine.release()
                engine.step()
            await asyncio.sleep(0.05)
        raise AssertionError("it does not come to an end")

    def is_well(self, replica: Replica) -> bool:
        engine = self.toys.engine(replica)
        return replica.is_open and engine.is_ready and engine.is_settled and not engine.hangs


def check_load(frontend: Any, replica: Replica) -> None:
    """Check the router's count of a replica's work against the requests that are there."""
    load = replica.load
    sent = [live for live in frontend._lives_of(replica) if live.sent]
    assert load.completions == sum(len(live.unfinished) for live in sent)
    assert set(load.unstarted) == {live for live in sent if not live.progress}
    assert load.queued_tokens == sum(load.unstarted.values()) >= 0
    assert all(tokens > 0 for tokens in load.unstarted.values())


def check_engine(frontend: Any, replica: Replica) -> None:
    """Check an engine that has handled all messages.

    It has exactly the completions that the frontend sent there, and the frontend knows its pages.
    """
    engine = replica.link
    if isinstance(engine, ToyEngine) and engine.is_settled and engine.is_ready and replica.readmission._is_ready:
        sent = [live for live in frontend._lives_of(replica) if live.sent]
        assert set(engine.sequences) == {each.request.id for live in sent for each in live.unfinished}
        assert engine.published is None or replica.load.pages == engine.published


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    log = logging.getLogger("octavo")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    yield
    log.setLevel(level)


def test_each_token_is_delivered_once_in_order(many: bool) -> None:
    run_state_machine_as_test(
        Fleet,
        settings=settings(
            max_examples=5000 if many else 60,
            stateful_step_count=60,
            deadline=None,
            derandomize=not many,
            report_multiple_bugs=False,
            phases=[Phase.generate],  # to shrink a failure takes minutes: add Phase.shrink to find out more
            suppress_health_check=list(HealthCheck),
        ),
    )


@given(
    replicas=st.integers(1, 4),
    others=st.lists(arguments, max_size=6),
    poisons=st.lists(st.tuples(st.sampled_from(POISONS), st.integers(0, 6)), min_size=1, max_size=3),
    steps=st.lists(which, max_size=40),
)
@settings(deadline=None, max_examples=50)
def test_poisonous_requests_fail_alone(
    replicas: int, others: list[Arguments], poisons: list[tuple[int, int]], steps: list[int]
) -> None:
    """One of them ends ENOUGH_FAULTS engines, and each further one at most one more. No other request fails."""
    prompts = [(one.rest, one.n) for one in others]
    for poison, place in poisons:
        prompts.insert(place, ([poison, 1, 2, 3], 1))

    async def main(loop: VirtualLoop) -> None:
        toys, problems, everyone = Toys(replicas), list[str](), list[Owed]()
        await toys.start()
        for prompt, n in prompts:
            by_seed = (SamplingParams(n=n, max_tokens=9, seed=seed) for seed in itertools.count())
            params = next(each for each in by_seed if expected(prompt, each).finish_reason == "length")
            owed = Owed(prompt, params, problems, None, loop.now, None, None)
            everyone.append(owed)
            toys.frontend.submit([toy_request(prompt, params)], [prompt], owed.sink)
        for number in steps:
            if running := toys.running:
                running[number % len(running)].step()
            await asyncio.sleep(0)
            await asyncio.sleep(0.011 * (number % 2))
        await toys.finish()
        assert not problems, problems
        for owed in everyone:
            assert isinstance(owed.end, RequestFailed) if owed.is_poison else owed.end == "finished"
        faults = sum(engine.fault is not None for engine in toys.engines)
        # A poison may be moved away from an engine that has died of it while its end has not been noticed yet.
        unnoticed = len(poisons) if replicas > 1 else 0
        assert faults <= ENOUGH_FAULTS * len(poisons) + len(poisons) - 1 + unnoticed
        await toys.frontend.close()

    with virtual_loop() as loop:
        loop.run_until_complete(main(loop))
        check_no_task_is_left(loop)
