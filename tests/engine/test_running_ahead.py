"""Steps that are launched before the tokens of the step before are read: the tokens are those of one step at a time.

The rest of this folder's tests run late too (conftest.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from late_backend import LateBackend, late_engines
from octavo import LLM, PoolingParams, SamplingParams, ScoringParams, StructuredOutputs
from octavo.backends.base import StepBatch, StepResult
from octavo.engine.engine import Engine
from octavo.engine.messages import EngineRequest, Thinking
from octavo.engine.work_record import WorkRecord
from octavo.kv import Transfers
from octavo.kv.tiers.disk import DiskTier
from prefix_backend import PrefixBackend

PAGE, LONGEST, VOCAB = 4, 32, 7
PER_ROW = ("temperature", "top_k", "seeds", "positions", "repetition", "presence", "frequency", "history_outputs")
RAGGED = (("history", "history_start"), ("bias_tokens", "bias_start"), ("bias_values", "bias_start"))
EOS = 6


class TellTale(PrefixBackend):
    """A backend whose tokens depend on all tokens before, and on all that the step says of how to sample them."""

    spec = SimpleNamespace(vocab_size=VOCAB, hidden_size=0)

    def step(self, batch: StepBatch) -> StepResult:
        states, sampling = self.write(batch)[batch.sample_rows], batch.sampling
        tokens = []
        for row, state in enumerate(states):
            told = [state.tobytes(), *(getattr(sampling, name)[row].tobytes() for name in PER_ROW)]
            for values, starts in RAGGED:
                start, end = getattr(sampling, starts)[row : row + 2]
                told.append(getattr(sampling, values)[start:end].tobytes())
            mask = sampling.masks[slice(*sampling.mask_start[row : row + 2])]
            allowed = [token for token in range(VOCAB) if not len(mask) or mask[0] >> token & 1]
            tokens.append(allowed[blake2b(b"".join(told)).digest()[0] % len(allowed)])
        return StepResult(np.array(tokens, np.int32))


@dataclass
class Served:
    """The answers of an engine on a clock that the test turns."""

    engine: Engine
    now: float = 0.0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)

    def add(self, request: EngineRequest) -> None:
        self.tokens[request.id] = []
        self.engine.add(request)

    def step(self) -> None:
        self.now += 1
        for output in self.engine.step():
            assert output.id not in self.ended, "an output after the last one"
            assert output.finish_reason not in ("error", "invalid"), output.message
            if output.token >= 0:
                self.tokens[output.id].append(output.token)
            if output.finish_reason:
                self.ended[output.id] = output.finish_reason

    def abort(self, which: int) -> None:
        live = sorted(self.tokens.keys() - self.ended.keys())
        if live:
            self.engine.abort([live[which % len(live)]])
            self.ended[live[which % len(live)]] = "aborted"

    def finish(self) -> None:
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.step()
        assert self.ended.keys() == self.tokens.keys(), "a request is never served"
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.free_pages + stats.cached_pages) == (0, 0, stats.num_pages)
        assert self.engine.rows == 0


@contextmanager
def serving(late: bool, num_pages: int = 16, folder: Path | None = None, **limits: int) -> Iterator[Served]:
    made: Any = TellTale(num_pages, PAGE)
    backend = LateBackend(made) if late else made
    transfers = Transfers(backend, [] if folder is None else [DiskTier(folder, 1 << 20, made.page_bytes)])
    terms = {"max_batch_size": 4, "max_batch_tokens": 12} | limits
    engine = Engine(
        backend,
        num_pages=num_pages,
        max_model_len=LONGEST,
        transfers=transfers,
        clock=lambda: served.now,
        **terms,
    )
    served = Served(engine)
    yield served
    engine.close()


def alone(request: EngineRequest) -> tuple[list[int], str]:
    """The answer to a request that nothing delays and nothing accompanies, one step at a time."""
    with serving(late=False) as served:
        served.add(request)
        served.finish()
    return served.tokens[request.id], served.ended[request.id]


IDS = map(str, count())
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "random": {"temperature": 1.0, "seed": 5},
    "biased": {"logit_bias": {1: 2.0}, "min_tokens": 1},
    "allowed": {"allowed_token_ids": [1, 3, EOS]},
    "penalized": {"frequency_penalty": 0.5},
    "drafts": {"speculative_tokens": 3},
    "bad words": {"banned": [[1, 2], [3]]},
    "thinks": {"thinking": Thinking(budget=2, start=[1], end=[2, 3])},
}
NEED_THE_HOST = {"penalized", "drafts", "bad words", "thinks"}
REQUEST = st.tuples(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=18),
    st.integers(1, 12),
    st.sampled_from([(), (EOS,), (2, EOS)]),
)
NUMBER = st.integers(0, 20)
EVENT = st.one_of(
    st.tuples(st.just("add"), REQUEST, st.sampled_from([None, None, None, 3.0])),
    st.tuples(st.just("abort"), NUMBER),
    st.tuples(st.just("step"), st.integers(1, 8)),
    st.tuples(st.just("step"), st.integers(1, 8)),
)


def request_of(kind: str, prompt: list[int], max_tokens: int, stops: tuple[int, ...], **terms: Any) -> EngineRequest:
    options = dict(KINDS[kind])
    terms |= {name: options.pop(name) for name in ("banned", "thinking") if name in options}
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=list(stops), **{"temperature": 0.0} | options)
    return EngineRequest(next(IDS), prompt, params, **terms)


@settings(max_examples=120, deadline=None)
@given(
    events=st.lists(EVENT, min_size=4, max_size=40),
    num_pages=st.integers(LONGEST // PAGE, 20),
    max_batch_size=st.integers(1, 6),
    max_batch_tokens=st.integers(1, 24),
)
def test_random_traffic(events, num_pages, max_batch_size, max_batch_tokens):
    """Every kind of request, with stops, aborts, timeouts and preemptions: each has the tokens that it has alone."""
    requests: list[EngineRequest] = []
    limits = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
    with serving(True, num_pages, **limits) as served:
        for name, *arguments in events:
            if name == "add":
                terms, timeout = arguments
                requests.append(request_of(*terms, timeout=timeout))
                served.add(requests[-1])
            elif name == "abort":
                served.abort(*arguments)
            else:
                for _ in range(arguments[0]):
                    served.step()
        served.finish()
    for request in requests:
        tokens, reason = alone(msgspec.structs.replace(request, timeout=None))
        if served.ended[request.id] in ("aborted", "timeout"):
            assert served.tokens[request.id] == tokens[: len(served.tokens[request.id])]
        else:
            assert (served.tokens[request.id], served.ended[request.id]) == (tokens, reason)


@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_ahead(kind: str) -> None:
    with serving(late=True) as served:
        request = request_of(kind, [1, 2, 3, 0, 5], 9, ())
        served.add(request)
        served.finish()
        assert served.engine.backend.most_unread == (1 if kind in NEED_THE_HOST else 2)
    assert (served.tokens[request.id], served.ended[request.id]) == alone(request)


@pytest.mark.parametrize("kind", ["plain", "penalized"])
def test_a_prompt_runs_ahead_of_its_own_chunks_and_the_last_token_of_nothing(kind: str) -> None:
    with serving(late=True, max_batch_tokens=4) as served:
        served.add(request_of(kind, [1] * 12, 1, ()))
        served.finish()
        assert (served.engine.backend.most_unread, served.engine.stats().steps) == (2, 3)


GRAMMAR = SamplingParams(temperature=1.0, seed=1, structured_outputs=StructuredOutputs(regex="[ab]{9}"))
SCORED = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2)
LONG = [43 * i % 500 for i in range(60)]


@pytest.mark.parametrize(
    "answer",
    [
        lambda llm: llm.generate("Say", GRAMMAR)[0].outputs[0].token_ids,
        lambda llm: llm.generate([LONG], SCORED)[0].prompt_logprobs,
        lambda llm: llm.embed([LONG], pooling_params=PoolingParams(pooling="mean"))[0].outputs.embedding,
        lambda llm: llm.embed([LONG], pooling_params=PoolingParams(pooling="last"))[0].outputs.embedding,
        lambda llm: llm.score("Say", "so", scoring_params=ScoringParams(labels=("a", "b")))[0].outputs.score,
    ],
    ids=["a grammar", "logprobs of the prompt", "mean", "last token", "labels"],
)
def test_what_waits_in_an_engine_with_a_model(llm: LLM, tiny_llama: Path, answer: Callable[[LLM], Any]) -> None:
    with late_engines() as backends, LLM(str(tiny_llama), max_batch_tokens=16) as late:
        assert answer(late) == answer(llm)
    assert [backend.most_unread for backend in backends] == [1]


def test_those_that_need_the_host_wait_alone() -> None:
    """Beside a sequence that runs ahead, one with penalties is in every other step."""
    with serving(late=True) as served:
        served.add(plain := request_of("plain", [1, 2], 20, ()))
        served.add(penalized := request_of("penalized", [2, 1], 20, ()))
        for _ in range(10):
            served.step()
        assert (len(served.tokens[plain.id]), len(served.tokens[penalized.id])) == (10, 5)
        served.finish()
    for request in (plain, penalized):
        assert (served.tokens[request.id], served.ended[request.id]) == alone(request)


def test_each_call_brings_the_tokens_of_one_step() -> None:
    """As of an engine that does not run ahead; and a sequence that has stopped costs one row more."""
    rows = {}
    for late in (False, True):
        with serving(late) as served:
            tokens = alone(plain := request_of("plain", [1, 2], 20, ()))[0]
            at = next(i for i in range(3, 20) if tokens[i] not in tokens[:i])
            served.add(request_of("plain", [1, 2], 20, (tokens[at],)))
            served.add(plain)
            seen = []
            while plain.id not in served.ended:
                served.step()
                seen.append(tuple(map(len, served.tokens.values())))
            assert seen == [(min(i, at + 1), i) for i in range(1, 21)]
            served.finish()
            rows[late] = served.engine.stats().tokens_computed
    assert rows[True] == rows[False] + 1


def test_a_page_that_is_being_computed_is_given_to_nobody_and_not_found() -> None:
    with serving(late=True, max_batch_tokens=PAGE) as served:
        pool = served.engine.kv.pool
        served.add(request_of("plain", [1] * 3 * PAGE, 9, ()))
        served.step()  # the first page has been computed, the second is being computed
        served.abort(0)
        assert (len(pool.keys), pool.num_available) == (1, 15)
        served.step()
        assert (len(pool.keys), pool.num_available) == (1, 16)


def test_the_cache_can_be_reset_while_a_wasted_step_is_computed() -> None:
    with serving(late=True) as served:
        served.add(request_of("plain", [1, 2, 3, 4, 5], 9, tuple(range(VOCAB))))
        served.step()
        assert served.engine.backend.unread == 1 and not served.engine.scheduler.running
        assert served.engine.stats().cached_pages > 0
        assert served.engine.reset_cache() and not served.engine.has_work
        assert served.engine.stats().free_pages == 16


def test_a_step_that_needs_a_preemption_waits_for_the_results() -> None:
    requests = [request_of("plain", [i] * 6, 20, ()) for i in range(4)]
    with serving(late=True, num_pages=9) as served:
        for request in requests:
            served.add(request)
        served.finish()
        assert served.engine.stats().preemptions > 0
        assert served.engine.backend.most_unread == 2
    assert all((served.tokens[request.id], served.ended[request.id]) == alone(request) for request in requests)


@pytest.mark.parametrize("late", [False, True])
def test_the_work_record_has_the_prompts_of_all_steps_that_are_computed(late: bool) -> None:
    work, computing = WorkRecord(), list[tuple[str, ...] | None]()

    class Watching(TellTale):
        def step(self, batch: StepBatch) -> StepResult:
            computing.append(work.read().prompts)
            return super().step(batch)

    made: Any = Watching(16, PAGE)
    terms = {"num_pages": 16, "max_model_len": LONGEST, "max_batch_size": 4, "max_batch_tokens": 4}
    engine = Engine(LateBackend(made) if late else made, **terms, work=work)
    engine.add(EngineRequest("a", [1] * 6, SamplingParams(max_tokens=4)))
    engine.step()
    between = (work.read().prompts, engine.rows)
    engine.add(EngineRequest("b", [2], SamplingParams(max_tokens=2)))
    assert (work.read().prompts, engine.rows) == between == ((("a",), 2) if late else (None, 0))
    while engine.has_work:
        engine.step()
    assert (work.read().prompts, engine.rows) == (None, 0)
    if not late:
        assert computing == [("a",), ("a", "b"), (), (), ()]
    engine.close()


def test_a_token_that_cannot_be_sampled_ends_its_request_alone() -> None:
    """The step that was launched meanwhile has it for its input."""

    class Failing(TellTale):
        def step(self, batch: StepBatch) -> StepResult:
            result = super().step(batch)
            result.tokens[batch.sampling.seeds == 9] = -1
            return result

    engine = Engine(
        LateBackend(Failing(16, PAGE)), num_pages=16, max_model_len=LONGEST, max_batch_size=4, max_batch_tokens=9
    )
    plain = request_of("plain", [1, 2], 6, ())
    engine.add(msgspec.structs.replace(plain, params=SamplingParams(max_tokens=9, seed=9), id="fails"))
    engine.add(plain)
    outputs = [output for _ in range(8) for output in engine.step()]
    assert [output.finish_reason for output in outputs if output.id == "fails"] == ["error"]
    assert [output.token for output in outputs if output.id == plain.id] == alone(plain)[0]
    assert not engine.has_work
    engine.close()


def test_an_engine_is_closed_while_steps_are_computed(tmp_path: Path) -> None:
    """What it saves is what has been computed: the next engine finds that and nothing else."""
    request = request_of("plain", [1, 2, 3, 4, 5] * 4, 9, ())
    with serving(True, folder=tmp_path, max_batch_tokens=2 * PAGE) as served:
        served.add(request)
        served.step()  # the first two pages have been computed, the next two are being computed
        assert served.engine.backend.unread == 1
    with serving(True, folder=tmp_path) as served:
        served.add(request)
        served.finish()
        assert served.engine.stats().pages_fetched == 2
    assert (served.tokens[request.id], served.ended[request.id]) == alone(request)


@pytest.mark.parametrize("half", ["launch", "_compute"])
def test_errors_in_flight(llm: LLM, tiny_llama: Path, caplog: pytest.LogCaptureFixture, half: str) -> None:
    """A step that fails, at once or when its result is read, ends the engine; the next one gives the same tokens.

    Another step is launched then: the one before it, or the one after it.
    """
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=20, ignore_eos=True)
    expected = [output.outputs[0].token_ids for output in llm.generate(["Say", "Do"], params)]
    left, do = count(), getattr(LateBackend, half)

    def failing(self: LateBackend, batch: StepBatch) -> Any:
        if next(left) == 7:
            raise RuntimeError("the device is gone")
        return do(self, batch)

    with late_engines(), patch.object(LateBackend, half, failing), LLM(str(tiny_llama)) as late:
        assert [output.outputs[0].token_ids for output in late.generate(["Say", "Do"], params)] == expected
        stats = late.stats()
    assert next(left) > 8 and "the device is gone" in caplog.text
    assert (stats.running, stats.free_pages + stats.cached_pages) == (0, stats.num_pages)
