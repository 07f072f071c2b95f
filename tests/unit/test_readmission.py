"""Readmission: who is sent to the next engine, when, and who is held responsible for a crash."""

from dataclasses import dataclass, field

import pytest

from octavo.engine.work_record import Work, WorkRecord
from octavo.frontend.links.link import Exit
from octavo.frontend.readmission import ENOUGH_KILLS, SUSPECT_KILLS, TRIAL_TOKENS, Readmission


@dataclass(eq=False)
class Live:
    """What Readmission knows of a LiveRequest."""

    name: str
    arrival: float
    sent: bool = False
    progress: int = 0
    crashes: int = 0
    engine_ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine_ids = [self.name]


class Engines:
    """A row of engines that crash: what each was sent, and the live requests."""

    def __init__(self, names: str):
        self.lives = {name: Live(name, arrival) for arrival, name in enumerate(names)}
        self.sent: list[str] = []
        self.waiting: list[Live] = list(self.lives.values())
        self.readmission = Readmission(
            lambda live: self.sent.append(live.name),  # type: ignore[arg-type]
            self.opened,
        )
        self.readmission.engine_ready()

    def opened(self) -> None:
        while self.waiting:
            self.readmission.add(self.waiting.pop(0))  # type: ignore[arg-type]

    def token(self, *names: str) -> None:
        for name in names:
            for _ in range(TRIAL_TOKENS):
                self.readmission.progressed(self.lives[name])  # type: ignore[arg-type]

    def crash(self, work: Work, is_fault: bool = True) -> str | None:
        self.sent = []
        exit = Exit("", is_fault, work)
        culprit, others = self.readmission.engine_lost(self.lives.values(), exit)  # type: ignore[arg-type]
        self.waiting[:0] = others  # type: ignore[arg-type]
        if culprit is not None:
            del self.lives[culprit.name]  # type: ignore[attr-defined]
        self.readmission.engine_ready()
        return None if culprit is None else culprit.name  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_fault", [True, False], ids=["fault", "kill"])
def test_code_for_one_request_ends_two_engines(is_fault: bool) -> None:
    engines = Engines("abpc")
    assert engines.crash(Work(alone="p"), is_fault) is None
    assert sorted(engines.sent) == list("abc")
    engines.token("b")
    assert engines.sent == list("abcp")
    assert engines.crash(Work(alone="p"), is_fault) == "p"
    assert sorted(engines.sent) == list("abc")


def test_two_of_them_in_turn() -> None:
    engines = Engines("apqb")
    assert [engines.crash(Work(alone=name)) for name in "pq"] == [None, None]
    assert engines.sent == list("ab")
    engines.token("a")
    assert engines.sent == list("abpq")
    assert [engines.crash(Work(alone=name)) for name in "pq"] == ["p", "q"]
    assert engines.sent == list("ab")


def test_one_that_is_left_alone_is_not_forgotten() -> None:
    engines = Engines("p")
    engines.crash(Work(alone="p"))
    assert engines.sent == ["p"]
    engines = Engines("ap")
    engines.crash(Work(alone="p"))
    engines.readmission.ended(engines.lives["a"])  # type: ignore[arg-type]
    assert engines.sent == ["a", "p"]


@pytest.mark.parametrize("work", [Work(), Work(prompts=("p", "c"))], ids=["unknown", "a step"])
def test_suspects_go_one_at_a_time(work: Work) -> None:
    engines = Engines("aqbpc")  # q and a wait in the engine's queue, so that they are in no step
    engines.token("b")
    assert engines.crash(work) is None
    suspects = "baqpc" if work == Work() else "bpc"
    for i, name in enumerate(suspects):
        assert engines.sent == list(suspects[: i + 1])
        if name == "p":
            break
        engines.token(name)
    assert engines.crash(work) == "p"
    assert sorted(engines.sent) == list("abcq")


def test_new_requests_wait_for_suspects() -> None:
    engines = Engines("ab")
    engines.crash(Work())
    engines.lives["n"] = Live("n", 9)
    engines.waiting.append(engines.lives["n"])
    assert engines.sent == ["a"] and not engines.readmission.is_open
    engines.token("a", "b")
    assert engines.sent == ["a", "b", "n"]


def test_a_suspect_that_ends_lets_the_next_one_go() -> None:
    engines = Engines("abc")
    engines.crash(Work())
    for name in "ab":
        engines.readmission.ended(engines.lives[name])  # type: ignore[arg-type]
    assert engines.sent == ["a", "b", "c"]


@pytest.mark.parametrize("work", [Work(alone="a"), Work(prompts=())], ids=["code for another request", "a step"])
def test_a_trial_that_another_request_interrupts_goes_on(work: Work) -> None:
    engines = Engines("apb")
    engines.crash(Work())
    engines.token("a")
    assert engines.sent == ["a", "p"]  # p is on trial
    if work.alone:
        assert engines.crash(work) == "a"
    else:
        assert engines.crash(work) is None
        engines.token("a")
    assert engines.sent[-1] == "p" and not engines.readmission.is_open
    assert engines.crash(Work()) == "p"


def test_crashes_of_a_known_cause_do_not_count_for_others() -> None:
    engines = Engines("apb")
    engines.crash(Work())
    engines.token("a")
    assert engines.crash(Work()) == "p"
    assert [live.crashes for live in engines.lives.values()] == [0, 0]


def test_a_replica_without_an_engine_releases_its_requests() -> None:
    engines = Engines("abc")
    engines.crash(Work(alone="c"))
    engines.crash(Work())
    assert engines.sent == ["a"]
    assert [live.name for live in engines.readmission.release()] == ["b", "c"]
    engines.token("a")
    assert engines.sent == ["a"]


def test_kills_from_outside_blame_nobody_who_waits() -> None:
    engines = Engines("rw")
    for _ in range(20):
        engines.token("r")
        assert engines.crash(Work(prompts=()), is_fault=False) is None
        assert engines.sent == ["r", "w"]
    assert engines.lives["w"].crashes == 0


def test_a_prompt_that_never_survives_is_given_up() -> None:
    engines = Engines("p")
    kills = 1
    while engines.crash(Work(prompts=("p",)), is_fault=False) is None:
        assert engines.sent == ["p"]
        kills += 1
    assert kills == ENOUGH_KILLS > SUSPECT_KILLS


def test_what_a_record_says() -> None:
    record = WorkRecord(WorkRecord.share())
    assert record.read() == Work()
    record.serving("é1")
    assert record.read() == Work(alone="é1")
    record.computing(["a", "b"])
    assert record.read() == Work(prompts=("a", "b"))
    record.computing([])
    assert record.read() == Work(prompts=())
    record.computing(["x" * 100] * 1000)
    assert record.read() == Work()
    record.serving("a")
    record.nothing()
    assert record.read() == Work()
