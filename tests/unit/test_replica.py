"""Replica: the pauses between restarts, and how long a step may take."""

import pytest

from octavo.engine.messages import TokenOutput
from octavo.frontend.links.messages import Alive, Tokens
from octavo.frontend.replica import FIRST_PAUSE, MAX_PAUSE, QUICK_RESTARTS, STEP_LIMIT, STEP_SECONDS, Replica
from octavo.frontend.router import Router


class Owner:
    """Takes messages, and does nothing."""

    def replica_message(self, *_: object) -> None:
        pass


@pytest.fixture
def replica() -> Replica:
    return Replica(lambda: None, Owner(), Router().new_replica())  # type: ignore[arg-type, return-value]


def test_pauses_grow_until_an_engine_computes(replica: Replica) -> None:
    pauses = [replica._pause() for _ in range(QUICK_RESTARTS + 12)]
    assert pauses[:QUICK_RESTARTS] == [0.0] * QUICK_RESTARTS
    assert pauses[QUICK_RESTARTS] == FIRST_PAUSE and pauses == sorted(pauses) and pauses[-1] == MAX_PAUSE
    replica._on_message(Tokens([], b"a trace of a step without a token"))
    assert replica._pause() == MAX_PAUSE
    replica._on_message(Tokens([TokenOutput("0", 1)]))
    assert replica._pause() == 0.0


@pytest.mark.parametrize(
    ("alive", "limit"),
    [
        (Alive(9.0), STEP_SECONDS),  # Python runs: no model is too slow for that
        (Alive(9.0, rows=1, slowest_seconds=0.01, slowest_rows=2), STEP_SECONDS),
        (Alive(9.0, rows=512, slowest_seconds=0.5, slowest_rows=2), STEP_LIMIT * 0.5 * 256),
        (Alive(9.0, rows=1, slowest_seconds=25.0, slowest_rows=512), STEP_LIMIT * 25.0),
    ],
    ids=["scheduling", "a small model", "a long prompt after short steps", "decoding after a long prompt"],
)
def test_a_step_may_take_what_its_tokens_take(replica: Replica, alive: Alive, limit: float) -> None:
    replica._on_message(alive)
    assert replica._step_limit() == limit
