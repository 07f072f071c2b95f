"""A Backend that computes nothing: a step advances a virtual clock by the time that a cost model gives."""

import functools

import numpy as np

from octavo.backends.base import ComputesAtOnce, Footprint, StepBatch, StepResult
from octavo.model.spec import DecoderSpec, RopeSpec

from .costs import CostModel, Shape

# The tokens of a text are successive states of a linear congruential generator with full period over [0, 2^31). A token
# determines the next one, so the backend can continue any text, and prefixes are equal exactly where texts are.
VOCABULARY = 2**31
_FACTOR, _STEP = 1103515245, 12345

NO_MODEL = "a simulated backend has neither K and V nor logits"


def text(number: int, length: int) -> np.ndarray:
    """Return the first `length` tokens of text `number`: int64 [length]. No two texts agree at any position."""
    first = number * 0x9E3779B1 % VOCABULARY  # the factor is odd, so first tokens differ
    return np.concatenate([np.array([first], np.int64), continuations(np.array([first]), length - 1)[0]])[:length]


def continuations(last: np.ndarray, count: int) -> np.ndarray:
    """Return the next `count` tokens after each of the tokens `last`.

    Shapes:
        last: int64 [N]. Result: int64 [N, count].
    """
    factors, steps = _jumps(max(count, 0))
    tokens: np.ndarray = (last[:, None] * factors + steps) % VOCABULARY
    return tokens


def next_token(token: int) -> int:
    """Return the token after `token`."""
    return (token * _FACTOR + _STEP) % VOCABULARY


def _jumps(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return factors and steps of the generator that go 1, 2, ... `count` tokens ahead: int64 [count] each."""
    size = 1 << max(8, (count - 1).bit_length())
    factors, steps = _all_jumps(size)
    return factors[:count], steps[:count]


@functools.cache
def _all_jumps(size: int) -> tuple[np.ndarray, np.ndarray]:
    factors, steps = np.array([_FACTOR], np.int64), np.array([_STEP], np.int64)
    while len(factors) < size:
        steps = np.concatenate([steps, (steps * factors[-1] + steps[-1]) % VOCABULARY])
        factors = np.concatenate([factors, factors * factors[-1] % VOCABULARY])
    return factors, steps


class VirtualClock:
    """A clock in seconds from 0, which only `advance` moves."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, "time does not run backwards"
        self._now += seconds


class SimulatedBackend(ComputesAtOnce):
    """A Backend (see backends.base) whose output continues a `text`. Requests must have no end-of-sequence tokens."""

    arithmetic = "simulated"

    def __init__(self, costs: CostModel, clock: VirtualClock):
        self.page_size, self.page_bytes = costs.page_size, costs.page_bytes
        self.footprint = Footprint("simulated", 0, costs.page_bytes)
        self.spec = DecoderSpec(
            vocab_size=VOCABULARY,
            hidden_size=0,
            intermediate_size=0,
            num_layers=0,
            num_heads=0,
            num_kv_heads=0,
            head_dim=0,
            max_positions=costs.max_model_len,
            norm_eps=0.0,
            rope=RopeSpec(),
            windows=(),
        )
        self._costs, self._clock = costs, clock

    def allocate_kv(self, num_pages: int) -> None:
        pass

    def export_page(self, page: int) -> np.ndarray:
        raise NotImplementedError(NO_MODEL)

    def import_page(self, page: int, content: np.ndarray) -> None:
        raise NotImplementedError(NO_MODEL)

    def copy_page(self, source: int, target: int) -> None:
        pass

    def step(self, batch: StepBatch) -> StepResult:
        self._clock.advance(self._costs.seconds(Shape.of(batch)))
        ends = batch.tokens[batch.sample_rows].astype(np.int64)
        return StepResult(continuations(ends, 1)[:, 0].astype(np.int32))

    def logits(self, batch: StepBatch) -> np.ndarray:
        raise NotImplementedError(NO_MODEL)

    def close(self) -> None:
        pass
