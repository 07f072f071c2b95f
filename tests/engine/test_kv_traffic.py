"""Random traffic over tiny pools, tiers and policies: every token right, nobody left waiting, no page lost.

The reference is the model's own arithmetic (prefix_backend.py) for what a request must bring, and a count of who can
hold a page for what the pool must say.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile_store import HostileStore
from octavo.config import POLICIES, EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import load_policy
from octavo.engine.messages import EngineRequest
from octavo.kv.store import reading
from octavo.kv.store.sharing import Sharing
from octavo.kv.tiers.disk import DiskTier
from octavo.kv.tiers.host import HostTier
from octavo.kv.tiers.tier import Tier
from octavo.kv.transfers import Transfers
from octavo.params import SamplingParams
from prefix_backend import PrefixBackend, complete

PAGE = 4
LONGEST = 32


class Traffic:
    """Does to an engine what an event says, and knows what must come of it."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.expected: dict[str, list[int]] = {}
        self.received: dict[str, list[int]] = {}
        self.requests: dict[str, tuple[list[int], str, str]] = {}
        self.done: list[tuple[list[int], str, str]] = []  # conversations that ended, with tenant and salt
        self.states: list[str] = []
        self.ids = map(str, count())

    def add(self, prompt: list[int], max_tokens: int, tenant: str, salt: str, copies: int = 1) -> None:
        leader = None
        for _ in range(copies):
            id = next(self.ids)
            request = EngineRequest(
                id,
                prompt,
                SamplingParams(max_tokens=max_tokens),
                0.0,
                after=leader,
                tenant=tenant,
                salt=salt,
                priority=len(prompt) % 3,
                ttft_target=float(max_tokens),
            )
            leader = leader or id
            self.engine.add(request)
            self.expected[id], self.received[id] = complete(prompt, max_tokens), []
            self.requests[id] = (prompt, tenant, salt)

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.step()

    def step(self) -> None:
        for output in self.engine.step():
            assert output.finish_reason != "error", output.message
            self.received[output.id].append(output.token)
            if output.finish_reason:
                assert self.received[output.id] == self.expected.pop(output.id)
                prompt, tenant, salt = self.requests[output.id]
                self.done.append((prompt + self.received[output.id], tenant, salt))

    def abort(self, which: int) -> None:
        if self.expected:
            id = sorted(self.expected)[which % len(self.expected)]
            self.engine.abort([id])
            del self.expected[id]

    def go_on(self, which: int, further: list[int]) -> None:
        if self.done:
            conversation, tenant, salt = self.done[which % len(self.done)]
            room = LONGEST - len(conversation) - len(further)
            if room > 0:
                self.add(conversation + further, min(3, room), tenant, salt)

    def pin(self, which: int) -> None:
        if self.done:
            id = f"state-{which % 4}"
            self.engine.pin(id, *self.done[which % len(self.done)])
            self.states.append(id)

    def unpin(self, which: int) -> None:
        if self.states:
            self.engine.unpin(self.states.pop(which % len(self.states)))


NUMBER = st.integers(0, 20)
TOKENS = st.builds(  # few beginnings, so that they meet again
    lambda pattern, length: (pattern * 20)[:length],
    st.sampled_from([[0], [1, 0], [0, 1, 2], [2, 2, 0, 1]]),
    st.integers(1, 20),
)
TENANT, SALT = st.sampled_from(["", "a"]), st.sampled_from(["", "s"])
EVENT = st.one_of(
    st.tuples(st.just("add"), TOKENS, st.integers(1, 12), TENANT, SALT, st.integers(1, 3)),
    st.tuples(st.just("abort"), NUMBER),
    st.tuples(st.just("go_on"), NUMBER, st.lists(st.integers(0, 2), min_size=1, max_size=6)),
    st.tuples(st.just("pin"), NUMBER),
    st.tuples(st.just("unpin"), NUMBER),
    st.tuples(st.just("steps"), st.integers(1, 20)),
    st.tuples(st.just("steps"), st.integers(1, 20)),
)


@contextmanager
def tiers(kinds: str, page_bytes: int) -> Iterator[list[Tier]]:
    with tempfile.TemporaryDirectory() as folder:
        made: list[Tier] = []
        if "host" in kinds:
            made.append(HostTier(6 * page_bytes))
        if "disk" in kinds:
            made.append(DiskTier(Path(folder), 4096 * 30, page_bytes))
        yield made


def shared(backend: PrefixBackend, transfers: Transfers, faults: list[str], delay: float) -> Sharing:
    """A store that does what `faults` say, one for each page that is read from it, and takes `delay` seconds each."""
    store, left = HostileStore(), iter(faults)

    def delayed(_: object, answer: object) -> object:
        time.sleep(delay)
        return answer

    def answer(_: object, value: bytes | None) -> object:
        time.sleep(delay)
        fault = next(left, "")
        if fault == "raises":
            raise OSError("the store is gone")
        return None if fault == "loses" else b"garbage" if fault == "garbage" else value

    store.faults |= {"get": answer, "has": delayed}
    return Sharing(store, backend, fingerprint="", ttl=60.0, on_change=transfers.wake)


@pytest.mark.parametrize("kinds", ["none", "host", "disk", "host and disk", "store", "host and store", "late store"])
@settings(max_examples=40, deadline=None)
@given(
    events=st.lists(EVENT, min_size=8, max_size=60),
    num_pages=st.integers(LONGEST // PAGE, 16),
    max_batch_size=st.integers(1, 6),
    max_batch_tokens=st.integers(1, 24),
    policy=st.sampled_from(POLICIES),
    preemption=st.sampled_from(["auto", "swap", "recompute"]),
    guesses=st.sampled_from([0, 3]),
    faults=st.lists(st.sampled_from(["", "", "loses", "garbage", "raises"]), max_size=20),
)
def test_random_traffic(
    kinds, events, num_pages, max_batch_size, max_batch_tokens, policy, preemption, guesses, faults
):
    backend = PrefixBackend(num_pages, PAGE)
    delay, patience = (0.0006, 0.0003) if "late" in kinds else (0.0, reading.PATIENCE)
    with tiers(kinds, backend.page_bytes) as below, patch.object(reading, "PATIENCE", patience):
        transfers = Transfers(backend, below)
        engine = Engine(
            backend,
            num_pages=num_pages,
            max_model_len=LONGEST,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            policy=load_policy(EngineConfig(scheduling_policy=policy)),
            preemption=preemption,
            speculative_tokens=guesses,
            transfers=transfers,
            sharing=shared(backend, transfers, faults, delay) if "store" in kinds else None,
        )
        traffic = Traffic(engine)
        for name, *arguments in events:
            getattr(traffic, name)(*arguments)
        steps = 1000 + 100 * len(traffic.expected)
        while engine.has_work:
            traffic.step()
            steps -= 1
            assert steps > 0, f"{len(traffic.expected)} requests are never served"
        assert not traffic.expected
        for id in traffic.states:
            engine.unpin(id)
        stats = engine.stats()
        assert stats.free_pages + stats.cached_pages == num_pages, "pages leaked"
        engine.close()
