"""Masks are computed beside the steps: a slow grammar makes nobody wait but its own request, and changes no token."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from octavo import LLM, AsyncLLM, RequestOutput, SamplingParams, StructuredOutputs
from octavo.engine import constraints
from octavo.engine.engine import MAX_IDLE
from octavo.engine.scheduler import Scheduler
from octavo.errors import InvalidRequest, RequestTimeout
from octavo.text import grammars
from octavo.text.grammars import Grammars, Matcher

PLAIN = SamplingParams(seed=1, max_tokens=60, ignore_eos=True)


def constrained(regex: str, **terms: object) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=1, max_tokens=80, structured_outputs={"regex": regex}, **terms)


HELD = "(held|kept)[abc]{30}"
OTHER = constrained("[xy]{20}")


class Gate:
    """Blocks the threads that compute masks of the grammar HELD, from the second mask of an output on.

    Args:
        slow: whether the grammar is known to be slow.
        compiling: whether to block the thread that compiles grammars instead.
    """

    def __init__(self, patch: pytest.MonkeyPatch, slow: bool = False, compiling: bool = False):
        self.reached, self.opened = threading.Event(), threading.Event()
        self._slow, self._compiling = slow, compiling
        self._matcher, self._masks = Grammars.matcher, Matcher.masks
        self._begun: set[Matcher] = set()
        gate = self
        patch.setattr(Grammars, "matcher", lambda *arguments: gate._make(*arguments))
        patch.setattr(Matcher, "masks", lambda *arguments: gate._compute(*arguments))
        patch.setattr(Matcher, "is_slow", property(lambda matcher: slow and hasattr(matcher, "held")))

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.set()

    def _make(self, grammars: Grammars, outputs: StructuredOutputs, output: tuple[int, ...] = ()) -> Matcher:
        if self._compiling and threading.current_thread().name.startswith("octavo-grammars"):
            self._pass()
        matcher = self._matcher(grammars, outputs, output)
        if outputs.regex == HELD and not self._compiling:
            matcher.held = True
        return matcher

    def _compute(self, matcher: Matcher, draft: "object" = None) -> list[bytes]:
        if matcher in self._begun:
            self._pass()
        elif hasattr(matcher, "held"):
            self._begun.add(matcher)
        return self._masks(matcher, draft)

    def _pass(self) -> None:
        self.reached.set()
        assert self.opened.wait(30)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.mark.parametrize(("slow", "n"), [(False, 1), (True, 8)])
def test_others_go_on(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor, slow: bool, n: int
) -> None:
    held = constrained(HELD, n=n)
    with LLM(str(tiny_llama), max_batch_size=16) as llm:
        expected = token_ids(llm.generate("Say", held))
        others = token_ids(llm.generate(["One", "Two"], [PLAIN, OTHER]))
    with Gate(monkeypatch, slow=slow) as gate, LLM(str(tiny_llama), max_batch_size=16) as llm:
        waiting = pool.submit(llm.generate, "Say", held)
        assert gate.reached.wait(10)
        assert token_ids(llm.generate(["One", "Two"], [PLAIN, OTHER])) == others
        assert not waiting.done() and llm.stats().running == n
        gate.opened.set()
        assert token_ids(waiting.result(10)) == expected


@pytest.mark.parametrize("compiling", [False, True], ids=["masks", "compiling"])
def test_an_engine_without_other_work_waits(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor, compiling: bool
) -> None:
    """It calls the scheduler once in MAX_IDLE, not as often as it can."""
    calls, many = 0, threading.Event()
    schedule = Scheduler.schedule

    def counted(self: Scheduler, **settings: bool) -> object:
        nonlocal calls
        calls += gate.reached.is_set()
        if calls == 50:
            many.set()
        return schedule(self, **settings)

    monkeypatch.setattr(Scheduler, "schedule", counted)
    with Gate(monkeypatch, compiling=compiling) as gate, LLM(str(tiny_llama)) as llm:
        waiting = pool.submit(llm.generate, "Say", constrained(HELD))
        assert gate.reached.wait(10)
        started = time.monotonic()
        assert many.wait(10)
        assert time.monotonic() - started > 40 * MAX_IDLE
        gate.opened.set()
        waiting.result(10)


def test_a_request_can_be_aborted_while_its_mask_is_computed(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Gate(monkeypatch) as gate, LLM(str(tiny_llama)) as llm:
        stream = iter(llm.stream("Say", constrained(HELD)))
        next(stream)
        assert gate.reached.wait(10)
        stream.close()
        while llm.stats().running:
            pass
        stats = llm.stats()
        assert stats.free_pages + stats.cached_pages == stats.num_pages
        gate.opened.set()
        assert len(token_ids(llm.generate("Say", PLAIN))[0]) == 60


def test_a_request_times_out_while_its_mask_is_computed(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    with Gate(monkeypatch) as gate, LLM(str(tiny_llama)) as llm:
        waiting = pool.submit(llm.generate, "Say", constrained(HELD), timeout=0.3)
        assert gate.reached.wait(10)
        with pytest.raises(RequestTimeout):
            waiting.result(10)


def test_masks_that_take_too_long_end_their_output_only(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(tiny_llama)) as llm:
        expected = token_ids(llm.generate("Say", PLAIN))
        monkeypatch.setattr(grammars, "MASK_SECONDS", -0.6 * grammars.MASK_BURST)  # the second mask exceeds the budget
        with pytest.raises(InvalidRequest, match="its masks take too long to compute"):
            llm.generate(["Say", "Say"], [constrained(HELD, n=3), PLAIN])
        assert token_ids(llm.generate("Say", PLAIN)) == expected
        stats = llm.stats()
        assert stats.running == 0 and stats.free_pages + stats.cached_pages == stats.num_pages


@pytest.mark.parametrize("replicas", [1, 2])
def test_constrained_streams_go_on_after_engines_are_killed(tiny_llama: Path, replicas: int) -> None:
    regexes = ["(abc|abd){20,30}", '\\{"items":\\[(\\d,){30}0\\]\\}', "[a-z ]{60}"]
    params = [constrained(regexes[i % 3], n=1 + i % 2, speculative_tokens=3 * (i % 2)) for i in range(8)]
    prompts = [f"Request {i}" for i in range(8)]

    async def scenario() -> None:
        async with AsyncLLM(str(tiny_llama), data_parallel_size=replicas) as llm, asyncio.timeout(60):
            expected = token_ids(await llm.agenerate(prompts, params))
            for kill in range(3):
                task = asyncio.ensure_future(llm.agenerate(prompts, params))
                replica = llm._frontend.replicas[kill % replicas]
                while not replica.load.completions or replica.load.unstarted:
                    await asyncio.sleep(0)
                os.kill(replica.link.pid, signal.SIGKILL)
                assert not task.done()
                assert token_ids(await task) == expected
                while not all(each.is_ready for each in llm._frontend.replicas):
                    await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_no_step_need_wait_for_masks(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens if steps skip all sequences whose masks are not computed yet, however quick they would be."""
    params = [constrained("(abc|abd){10,20}", n=1 + i % 2, speculative_tokens=4 * (i % 2)) for i in range(6)]
    prompts = [[5 + i] * 20 for i in range(6)]
    with LLM(str(tiny_llama)) as llm:
        expected = token_ids(llm.generate(prompts, params))
    monkeypatch.setattr(constraints, "QUICK_SECONDS", 0)
    monkeypatch.setattr(constraints, "QUICK_SHARE", 0)
    with LLM(str(tiny_llama)) as llm:
        assert token_ids(llm.generate(prompts, params)) == expected
