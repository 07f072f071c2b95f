"""Policies: the orders they keep, that nobody waits for ever under them, fair shares, and one's own."""

import asyncio
import itertools
import random
import subprocess
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import LLM, AsyncLLM, SamplingParams
from octavo.config import POLICIES, EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import load_policy
from octavo.engine.messages import EngineRequest
from octavo.engine.policies import DEFAULT_TTFT_TARGET, Policy, Priority
from octavo.engine.policies.fair import OUTPUT_TOKEN, PROMPT_TOKEN, REMEMBERED, Fair
from octavo.engine.sequence import Sequence
from octavo.errors import ConfigError
from octavo.kv import Prefix, root_key
from prefix_backend import PrefixBackend, complete
from scheduler_simulation import Simulation

MINE = "import octavo.engine.policies\n\nclass Mine(octavo.engine.policies.Policy):\n    "


def sequence(order: int, tenant: str = "", prompt: int = 1) -> Sequence:
    request = EngineRequest(str(order), [0] * prompt, SamplingParams(), tenant=tenant)
    tokens = array("i", request.prompt)
    seq = Sequence(request, order, frozenset(), tokens, Prefix(root_key("", "", ""), tokens, 4), prompt, prompt + 16)
    seq.place = (0.0, order)
    return seq


def order_of_admission(policy: str, requests: list[dict[str, Any]], **settings: Any) -> list[int]:
    """Requests come a second apart to a batch that is taken; the order in which they are admitted then."""
    sim = Simulation(num_pages=32, max_batch_size=1, max_batch_tokens=8, policy=policy, **settings)
    sim.add([0], len(requests) + 1)
    for terms in requests:
        sim.step()
        sim.add([0], 1, **terms)
    admitted = []
    while sim.live:
        admitted += [int(seq.id) - 1 for seq in sim.step().sequences if seq.id != "0"]
    return admitted


def test_fcfs() -> None:
    assert order_of_admission("fcfs", [{"priority": 3}, {"ttft_target": 9.0}, {"priority": -3}]) == [0, 1, 2]


def test_priority_ages() -> None:
    requests = [{"priority": 1}, {}, {"priority": -1}, {"priority": 1}, {}]
    assert order_of_admission("priority", requests, priority_aging=100) == [2, 1, 4, 0, 3]
    assert order_of_admission("priority", requests, priority_aging=2.5) == [2, 1, 0, 4, 3]
    assert order_of_admission("priority", requests, priority_aging=0.1) == [0, 1, 2, 3, 4]


def test_deadline() -> None:
    requests = [{}, {"ttft_target": 9.0}, {"ttft_target": 1.5}, {"ttft_target": 2.0}, {"ttft_target": 60.0}]
    assert DEFAULT_TTFT_TARGET == 10
    assert order_of_admission("deadline", requests) == [2, 3, 0, 1, 4]


def test_the_urgent_one_goes_before_the_rest_of_a_long_prompt() -> None:
    sim = Simulation(num_pages=32, max_batch_size=4, max_batch_tokens=8, policy="priority")
    sim.add([0] * 40, 1, priority=1)
    assert sim.step().chunks == [8]
    sim.add([1] * 10, 1)
    sim.add([2] * 10, 1, priority=2)
    assert [sim.step().chunks for _ in range(5)] == [[7, 1], [3, 5], [8], [8], [8]]


def test_pages_are_taken_from_the_least_urgent() -> None:
    sim = Simulation(num_pages=8, max_batch_size=2, max_batch_tokens=32, policy="priority", prefix_caching=False)
    sim.add([0] * 8, 20, priority=1)
    urgent = sim.add([1] * 8, 20)
    while urgent in sim.live:
        before = len(sim.live[urgent].tokens)
        sim.step()
        assert urgent not in sim.live or len(sim.live[urgent].tokens) == before + 1
    assert sim.scheduler.preemptions == 1


# The subject, whose terms are the worst, comes into a flood that is more than the engine can do and does not end.
FLOOD = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.integers(1, 20),
            "max_tokens": st.integers(1, 8),
            "priority": st.integers(-3, 3),
            "ttft_target": st.none() | st.floats(0, 20),
            "tenant": st.sampled_from("abc"),
        }
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=15, deadline=None)
@given(flood=FLOOD, num_pages=st.integers(7, 20), max_batch_size=st.integers(1, 4), before=st.integers(0, 20))
def test_nobody_waits_for_ever(policy: str, flood: list[Any], num_pages: int, max_batch_size: int, before: int) -> None:
    sim = Simulation(num_pages, max_batch_size, 8, policy=policy, priority_aging=2.0)
    arrivals = itertools.cycle(flood)

    def flood_and_step() -> None:
        for _ in range(2):
            terms = dict(next(arrivals))
            sim.add([sim.arrivals % 3] * terms.pop("prompt"), terms.pop("max_tokens"), **terms)
        sim.step()

    debt = sim.add([0] * 20, 8, tenant="subject")
    while debt in sim.live:
        sim.step()
    for _ in range(before):
        flood_and_step()
    waiting = len(sim.live)
    subject = sim.add([0] * 20, 8, tenant="subject", priority=3, ttft_target=20.0)
    overtaking = {
        "fcfs": 0,
        "priority": 2 * (3 + 3) * 2,  # two come a second, for as long as waiting makes up for the priority
        "deadline": 2 * 20,
        "fair": 3 * (20 * PROMPT_TOKEN + 8 * OUTPUT_TOKEN),  # of three tenants, until each has been served as much
    }[policy]
    alone = 20 // 8 + 1 + 8  # steps of the longest
    patience = (waiting + overtaking + 1) * 2 * alone  # preempted once, each of them
    while subject in sim.live:
        flood_and_step()
        patience -= 1
        assert patience > 0, "the subject is never served"


def test_new_tenants_for_ever_do_not_keep_a_tenant_waiting() -> None:
    sim = Simulation(num_pages=16, max_batch_size=1, max_batch_tokens=32, policy="fair")
    debt = sim.add([0] * 20, 10, tenant="subject")
    while debt in sim.live:
        sim.step()
    sim.add([0], 3, tenant="first")
    subject = sim.add([0] * 20, 10, tenant="subject")
    generations = (20 * PROMPT_TOKEN + 10 * OUTPUT_TOKEN) / OUTPUT_TOKEN
    for i in range(10 * int(generations)):
        sim.add([0], 1, tenant=f"new {i}")
        sim.step()
        if subject not in sim.live:
            return
    pytest.fail("the subject is never served")


class FairModel:
    """The rules of `fair` over plain dicts, looked through from end to end."""

    def __init__(self, weights: dict[str, float]):
        self.weights = weights
        self.counters: dict[str, float] = defaultdict(float)
        self.waiting: list[Sequence] = []
        self.floor = 0.0

    def add(self, seq: Sequence) -> None:
        if not seq.admitted and not any(other.tenant == seq.tenant for other in self.waiting):
            self.counters[seq.tenant] = max(self.counters[seq.tenant], self.floor + OUTPUT_TOKEN)
        self.waiting.append(seq)

    def may_be_next(self) -> list[Sequence]:
        """The first of each tenant that has the least counter."""
        tenants = {seq.tenant for seq in self.waiting}
        least = min((self.counters[tenant] for tenant in tenants), default=0.0)
        firsts = [min((s for s in self.waiting if s.tenant == t), key=lambda s: s.order) for t in tenants]
        return [seq for seq in firsts if self.counters[seq.tenant] == pytest.approx(least)]

    def pop(self, seq: Sequence) -> None:
        self.waiting.remove(seq)
        self.floor = max(self.floor, self.counters[seq.tenant])
        if not seq.admitted:
            self.counters[seq.tenant] += PROMPT_TOKEN * seq.num_uncomputed / self.weights.get(seq.tenant, 1)

    def charge(self, decoding: list[Sequence]) -> None:
        for seq in decoding:
            self.counters[seq.tenant] += OUTPUT_TOKEN / self.weights.get(seq.tenant, 1)


@settings(max_examples=100, deadline=None)
@given(
    operations=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.sampled_from("abcde"), st.integers(1, 30)),
            st.tuples(st.sampled_from(["admit", "charge", "preempt", "end", "abort"]), st.integers(0, 50)),
        ),
        max_size=80,
    )
)
def test_fair_against_its_rules(operations: list[tuple[Any, ...]]) -> None:
    policy, model = Fair(EngineConfig(tenant_weights="a=2,b=0.25")), FairModel({"a": 2, "b": 0.25})
    running: list[Sequence] = []
    for order, (what, *arguments) in enumerate(operations):
        if what == "add":
            seq = sequence(order, arguments[0], prompt=arguments[1])
            model.add(seq)
            policy.add(seq)
        elif what == "admit" and model.waiting:
            seq = policy.peek()
            assert seq in model.may_be_next()
            policy.pop()
            model.pop(seq)
            seq.admitted = True
            running.append(seq)
        elif what == "charge":
            decoding = running[: arguments[0]]
            policy.charge(decoding)
            model.charge(decoding)
        elif what in ("preempt", "end") and running:
            seq = running.pop(arguments[0] % len(running))
            if what == "preempt":
                model.add(seq)
                policy.add(seq)
        elif what == "abort" and model.waiting:
            seq = model.waiting.pop(arguments[0] % len(model.waiting))
            seq.aborted = True
            policy.remove(seq)
        assert (policy.peek() is None) == (not model.waiting)
        assert all(policy.key(seq)[0] == pytest.approx(model.counters[seq.tenant]) for seq in model.waiting + running)


@pytest.mark.parametrize("num_pages", [16, 400])
def test_tokens_are_shared_by_weight(num_pages: int) -> None:
    """Three tenants that always wait, with requests of other shapes. The bound is that of Sheng et al., theorem 4.4."""
    weights = {"a": 1.0, "b": 2.0, "c": 4.0}
    shapes = {"a": (2, 20), "b": (30, 4), "c": (10, 10)}
    sim = Simulation(num_pages, 8, 32, policy="fair", prefix_caching=False, tenant_weights="b=2,c=4")
    rng = random.Random(0)
    served = dict.fromkeys(weights, 0.0)
    finished = 0
    for _ in range(3000):
        for tenant, (prompt, output) in shapes.items():
            while sum(seq.tenant == tenant and seq.slot < 0 for seq in sim.live.values()) < 3:
                sim.add([rng.randrange(3) for _ in range(prompt)], output, tenant=tenant)
        live = dict(sim.live)
        sim.step()
        for id in [id for id in live if id not in sim.live]:
            prompt, output = shapes[live[id].tenant]
            cost = PROMPT_TOKEN * prompt + OUTPUT_TOKEN * (output - 1)
            served[live[id].tenant] += cost / weights[live[id].tenant]
            finished += 1
    largest = max(PROMPT_TOKEN * prompt + OUTPUT_TOKEN * output for prompt, output in shapes.values())
    assert finished > 300
    assert max(served.values()) - min(served.values()) < 2 * 8 * largest


def test_the_weight_of_a_request_is_its_tenants_from_then_on() -> None:
    """As the weight of an API key, which the engine's settings do not have."""
    sim, served = Simulation(400, 1, 32, policy="fair", prefix_caching=False), Counter[str]()
    for weight, expected in ((3.0, 3.0), (0.5, 0.5), (None, 1.0)):  # at last, no key has a weight any more
        served.clear()
        for _ in range(2000):
            for tenant, own in (("a", None), ("b", weight)):
                while sum(seq.tenant == tenant and seq.slot < 0 for seq in sim.live.values()) < 2:
                    sim.add([0, 1], 6, tenant=tenant, weight=own)
            live = dict(sim.live)
            sim.step()
            served.update(live[id].tenant for id in live if id not in sim.live)
        assert served["b"] / served["a"] == pytest.approx(expected, rel=0.05)


def test_a_tenant_that_wants_no_more_than_its_share_gets_it_at_once() -> None:
    sim = Simulation(num_pages=400, max_batch_size=8, max_batch_tokens=64, policy="fair")
    running = Counter[str]()
    for step in range(400):
        for tenant, wanted, length in (("loud", 40, 100), ("quiet", 4, 20)):
            while step % 3 == 0 and sum(seq.tenant == tenant for seq in sim.live.values()) < wanted:
                sim.add([1] * 4, length, tenant=tenant)  # until then, another tenant may have got its place
        sim.step()
        if step >= 20:
            running.update(seq.tenant for seq in sim.live.values() if seq.slot >= 0)
    assert running["quiet"] >= 0.7 * running["loud"]  # without this, each of its requests waits for another one's end


def test_a_tenant_far_below_its_share_takes_places_of_one_above() -> None:
    sim = Simulation(num_pages=400, max_batch_size=8, max_batch_tokens=64, policy="fair", tenant_weights="loud=3")

    def add_and_step(count: int, *tenants: str) -> list[int]:
        """How many sequences of each tenant run then."""
        for _ in range(count):
            for tenant in tenants:
                sim.add([1] * 4, 100, tenant=tenant)
        for _ in range(5):
            sim.step()
        return [
            sum(seq.slot >= 0 and seq.tenant == t for seq in sim.live.values()) for t in ("loud", "quiet", *tenants)
        ]

    assert add_and_step(20, "loud")[0] == 8
    assert add_and_step(1, "quiet") == [7, 1, 1]
    assert add_and_step(9, "quiet") == [7, 1, 1]  # that is half its share of 2: the others wait for places to come free
    assert add_and_step(1, "third") == [6, 1, 1]
    assert sim.scheduler.preemptions == 2
    add_and_step(1, *(f"new {i}" for i in range(10)))
    assert sim.scheduler.preemptions == 2  # the share of none of them is a sequence
    sim = Simulation(num_pages=400, max_batch_size=16, max_batch_tokens=64, policy="fair")
    assert add_and_step(20, "loud")[0] == 16
    assert add_and_step(20, "quiet") == [12, 4, 4]


def test_what_policies_remember_is_bounded() -> None:
    for name in POLICIES:
        policy = load_policy(EngineConfig(scheduling_policy=name))
        head = sequence(0, "head")
        policy.add(head)
        policy.peek()
        for order in range(1, 2 * REMEMBERED):
            seq = sequence(order, f"tenant {order}")
            policy.add(seq)
            seq.aborted = True
            policy.remove(seq)
        assert policy.peek() is head
        sizes = [len(value) for value in vars(policy).values() if isinstance(value, (list, dict))]
        assert all(size <= REMEMBERED for size in sizes)
        assert len(policy._queue._heap) < 100


def test_a_policy_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "latest.py").write_text(MINE + "def rank(self, seq):\n        return -seq.arrival\n")
    with LLM(str(tiny_llama), scheduling_policy="latest:Mine", max_batch_size=1) as llm:
        policy = llm._frontend.replicas[0].link.engine.scheduler.policy
        assert (type(policy).__name__, policy.config) == ("Mine", llm.config)
        assert llm.generate([[5, 6], [7, 8]], SamplingParams(max_tokens=3))[1].outputs
        seq = sequence(0)
        seq.arrival = 3.0
        assert policy.rank(seq) == -3.0


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("nowhere.at_all:Mine", "", "cannot import nowhere.at_all: ModuleNotFoundError.*PYTHONPATH"),
        ("broken:Mine", "1 / 0", "cannot import broken: ZeroDivisionError: division by zero"),
        ("empty:Mine", "", "empty has no Mine"),
        ("other:Mine", "class Mine: pass", "other has Mine, which is not a subclass of Policy"),
        ("thing:Mine", "Mine = 3", "thing has Mine, which is not a subclass of Policy"),
        (
            "fails:Mine",
            MINE + "def __init__(self, config):\n        {}['seat']",
            "its constructor raised KeyError: 'seat'",
        ),
    ],
)
def test_a_bad_policy_fails_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, name: str, source: str, message: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{name.split(':')[0]}.py").write_text(source)
    with pytest.raises(ConfigError, match=f"^scheduling_policy {name}.*{message}") as raised:
        LLM(str(tiny_llama), scheduling_policy=name)
    assert "\n" not in str(raised.value)


def test_a_bad_policy_fails_at_the_start_of_an_engine_process(tiny_llama: Path) -> None:
    async def start() -> None:
        async with AsyncLLM(str(tiny_llama), scheduling_policy="nowhere:Mine"):
            pass

    with pytest.raises(ConfigError, match="cannot import nowhere"):
        asyncio.run(start())


def test_a_policy_that_fails_for_one_request_fails_that_one_only() -> None:
    class Seats(Policy):
        def rank(self, seq: Sequence) -> float:
            return {"a": 1.0, "b": 2.0, "nan": float("nan")}[seq.tenant]

    engine = Engine(
        PrefixBackend(8, 4),
        num_pages=8,
        max_model_len=32,
        max_batch_size=4,
        max_batch_tokens=8,
        policy=Seats(EngineConfig()),
    )
    for tenant in ("a", "c", "nan", "b"):
        engine.add(EngineRequest(tenant, [0, 1], SamplingParams(max_tokens=3), tenant=tenant))
    outputs = [output for _ in range(4) for output in engine.step()]
    assert {o.id: o.message for o in outputs if o.finish_reason == "error"} == {
        "c": "the scheduling policy failed: KeyError: 'c'",
        "nan": "the scheduling policy failed: ValueError: the rank must be a number of seconds, not nan",
    }
    assert [o.token for o in outputs if o.id == "b"] == complete([0, 1], 3)
    assert not engine.has_work


METHODS = ("rank", "key", "add", "peek", "pop", "remove", "charge", "victim", "preempt_for")
NONSENSE = {
    "rank": [None, "soon", float("inf"), [0.0]],
    "key": [None, "first", 3, (None, None)],
    "peek": [7, [], object()],
    "victim": [None, 7, []],
    "preempt_for": [7, [], object()],
}


class Poisoned(Priority):
    """A policy that fails in one method, whenever that has to do with a sequence of the tenant "poison"."""

    method = ""
    answer: Any = None  # in place of raising

    def about(self, method: str, seq: Sequence | None) -> bool:
        hit = method == self.method and seq is not None and seq.tenant == "poison"
        if hit and self.answer is None:
            raise KeyError("a seat that is not there")
        return hit

    def rank(self, seq: Sequence) -> float:
        return self.answer[0] if self.about("rank", seq) else super().rank(seq)

    def key(self, seq: Sequence) -> tuple[float, int]:
        return self.answer[0] if self.about("key", seq) else super().key(seq)

    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.about("add", seq)

    def peek(self) -> Sequence | None:
        seq = super().peek()
        return self.answer[0] if self.about("peek", seq) else seq

    def pop(self) -> None:
        seq = super().peek()
        self.about("pop", seq)
        super().pop()

    def remove(self, seq: Sequence) -> None:
        self.about("remove", seq)
        super().remove(seq)

    def charge(self, decoding: Iterable[Sequence]) -> None:
        for seq in decoding:
            self.about("charge", seq)

    def victim(self, running: Collection[Sequence]) -> Sequence:
        poison = next((seq for seq in running if seq.tenant == "poison"), None)
        return self.answer[0] if self.about("victim", poison) else super().victim(running)

    def preempt_for(self, waiting: Sequence, running: Collection[Sequence]) -> Sequence | None:
        return self.answer[0] if self.about("preempt_for", waiting) else super().preempt_for(waiting, running)


def serve(policy: Policy, tenants: list[str], abort: str = "") -> dict[str, str | list[int]]:
    """The tokens of a request of each tenant, or its error, from an engine with too few slots and pages for all."""
    engine = Engine(
        PrefixBackend(14, 4), num_pages=14, max_model_len=40, max_batch_size=4, max_batch_tokens=12, policy=policy
    )
    served: dict[str, str | list[int]] = {}
    for i, tenant in enumerate(tenants):
        prompt = [i % 3] * (5 + i)
        id = f"{tenant} {i}"
        engine.add(EngineRequest(id, prompt, SamplingParams(max_tokens=16), tenant=tenant, priority=i % 3))
        served[id] = []
    for step in itertools.count():
        if step == 2:
            engine.abort([abort])
        for output in engine.step():
            tokens = served[output.id]
            assert isinstance(tokens, list), "an output after the last one"
            if output.finish_reason == "error":
                assert output.message and "\n" not in output.message
                served[output.id] = output.message
            else:
                tokens.append(output.token)
        if not engine.has_work:
            break
        assert step < 2000, "a request is never served"
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_pages + stats.cached_pages) == (0, 0, stats.num_pages)
    assert not engine._live and not len(engine._deadlines)
    return served


CASES = [(method, None) for method in METHODS]
CASES += [(method, (answer,)) for method, answers in NONSENSE.items() for answer in answers]


@pytest.mark.parametrize(("method", "answer"), CASES)
def test_a_policy_that_fails_in_a_method_fails_the_request_at_fault_alone(method: str, answer: Any) -> None:
    policy = Poisoned(EngineConfig())
    policy.method, policy.answer = method, answer
    tenants = ["a", "poison", "b", "c", "poison", "d", "e", "f"]
    for id, tokens in serve(policy, tenants, abort="poison 4").items():
        i = int(id.split()[1])
        if id.startswith("poison"):
            assert isinstance(tokens, str) or i == 4 or tokens == complete([i % 3] * (5 + i), 16)
        else:
            assert tokens == complete([i % 3] * (5 + i), 16)


@pytest.mark.parametrize("method", ["rank", "key", "add", "peek", "pop", "charge"])
def test_the_request_at_fault_is_told_why(method: str) -> None:
    policy = Poisoned(EngineConfig())
    policy.method = method
    poison = serve(policy, ["a", "poison", "b", "c", "d"])["poison 1"]
    assert poison == "the scheduling policy failed: KeyError: 'a seat that is not there'"


@pytest.mark.parametrize(("method", "answer"), CASES)
def test_a_policy_that_always_fails_does_not_end_the_engine(method: str, answer: Any) -> None:
    policy = Poisoned(EngineConfig())
    policy.method, policy.answer = method, answer
    for tokens in serve(policy, ["poison"] * 8, abort="poison 6").values():
        assert isinstance(tokens, (str, list))


def test_a_policy_of_the_current_folder_shadows_nothing(tmp_path: Path) -> None:
    """As in an engine process, which is started with -P: modules of the folder are found after all others."""
    (tmp_path / "random.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "seats.py").write_text("SEATS = 3\n")
    (tmp_path / "mine.py").write_text(MINE + "def rank(self, seq):\n        import seats\n        return seats.SEATS\n")
    code = """
import random, sys
from octavo.config import EngineConfig
from octavo.engine.policies.loading import load_policy
policy = load_policy(EngineConfig(scheduling_policy="mine:Mine"))
import secrets
print(policy.rank(None), random.__file__)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    rank, module = done.stdout.split()
    assert rank == "3" and not module.startswith(str(tmp_path)), done.stderr
