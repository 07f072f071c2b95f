"""A Backend that computes nothing: a step advances a virtual clock by the time that a cost model gives."""

import numpy as np

from octavo.backends.base import Footprint, StepBatch, StepResult
from octavo.model.spec import DecoderSpec, RopeSpec

from .costs import CostModel, Shape

# The tokens of a text are successive states of a linear congruential generator with full period over [0, 2^31). A token
# determines the next one, so the backend can continue any text, and prefixes are equal exactly where texts are.
VOCABULARY = 2**31
_FACTOR, _STEP = 1103515245, 12345

NO_MODEL = "a simulated backend has neither K and V nor logits"


def text(number: int, length: int) -> np.ndarray:
    """Return the first `length` tokens of text `number`: int64 [length]. No two texts agree at any position."""
    tokens = np.array([number * 0x9E3779B1 % VOCABULARY], np.int64)  # the factor is odd, so first tokens differ
    factor, step = _FACTOR, _STEP  # from a token to the one len(tokens) later
    while len(tokens) < length:
        tokens = np.concatenate([tokens, (tokens * factor + step) % VOCABULARY])
        factor, step = factor * factor % VOCABULARY, (factor * step + step) % VOCABULARY
    return tokens[:length]


class VirtualClock:
    """A clock in seconds from 0, which only `advance` moves."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, "time does not run backwards"
        self._now += seconds


class SimulatedBackend:
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
        return StepResult(((ends * _FACTOR + _STEP) % VOCABULARY).astype(np.int32))

    def logits(self, batch: StepBatch) -> np.ndarray:
        raise NotImplementedError(NO_MODEL)

    def close(self) -> None:
        pass
