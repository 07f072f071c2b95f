"""SimulatedEngine: the real engine in virtual time, which skips ahead while only the same sequences decode."""

import math
from array import array
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from octavo.backends.base import StepResult
from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.messages import EngineRequest, TokenOutput
from octavo.engine.policies import Policy
from octavo.engine.policies.loading import load_policy
from octavo.engine.recovery import FULL_STEP
from octavo.engine.scheduler import StepPlan
from octavo.engine.sequence import Sequence
from octavo.simulation.backend import SimulatedBackend, VirtualClock, continuations, next_token
from octavo.simulation.costs import CostModel, Shape

_NO_RESULT = StepResult(np.zeros(0, np.int32))


@dataclass(slots=True)
class Stretch:
    """Steps in a row in which the same sequences get one token each.

    Their times rise linearly, since every sequence has one token more to attend to in each step.

    Attributes:
        begun: seconds on the engine's clock.
        first, growth: seconds of the first step, and how much longer each step is than the one before it.
        steps: number of steps.
    """

    sequences: list[Sequence]
    begun: float
    first: float
    growth: float
    steps: int

    def seconds(self, steps: int) -> float:
        """Return the time of the first `steps` steps together."""
        return self.first * steps + self.growth * steps * (steps - 1) / 2

    def steps_before(self, time: float) -> int:
        """Return how many steps have begun before `time`, at least one; the last of them may not have ended."""
        left = time - self.begun
        if self.growth > 1e-15:
            half = self.first / self.growth - 0.5
            steps = math.ceil(math.sqrt(half * half + 2 * max(left, 0.0) / self.growth) - half)
        else:
            steps = math.ceil(left / self.first) if self.first else self.steps
        steps = min(self.steps, max(1, steps))
        while steps > 1 and self.begun + self.seconds(steps - 1) >= time:  # rounding
            steps -= 1
        while steps < self.steps and self.begun + self.seconds(steps) < time:
            steps += 1
        return steps


class SimulatedEngine(Engine):
    """The real scheduler, policy, page pool and prefix cache. A step takes the time that a cost model gives.

    `begin` begins a step, `finish` ends it at `ends_at`. As long as no prompt is computed and no sequence can be
    admitted, steps differ in nothing but the lengths of the sequences. Then `begin` begins a whole stretch of them, up
    to the one in which the first sequence ends; `interrupt` shortens it. The result is that of single steps.

    Args:
        costs: the times of steps.
        reports_all: whether `finish` returns every token; by default, only first and last tokens of requests.

    Attributes:
        ends_at: seconds on the clock; when the current step, or stretch of steps, ends.
        slowdown: factor of the time of steps.
        num_steps: steps that were computed.
    """

    def __init__(self, config: EngineConfig, costs: CostModel, num_pages: int):
        self.clock_ = clock = VirtualClock()
        super().__init__(
            SimulatedBackend(costs, clock),
            num_pages=num_pages,
            max_model_len=config.max_model_len or costs.max_model_len,
            max_batch_size=config.max_batch_size,
            max_batch_tokens=config.max_batch_tokens,
            policy=load_policy(config),
            prefix_caching=config.enable_prefix_caching,
            preemption=config.preemption,
            request_timeout=config.request_timeout,
            clock=clock,
        )
        self._costs = costs
        self._outputs: list[TokenOutput] = []
        self._stretch: Stretch | None = None
        self._unfinished: set[str] = set()  # requests whose latest token comes with the current step
        policy = type(self.scheduler.policy)
        # A policy that preempts for waiting sequences, or keeps accounts of tokens, must be asked in every step.
        self._can_skip = policy.preempt_for is Policy.preempt_for and policy.charge is Policy.charge
        self.ends_at = 0.0
        self.slowdown = 1.0
        self.reports_all = False
        self.prompts: tuple[str, ...] = ()  # requests whose prompts are in the current step
        self.kv.watch(with_content=False)

    @property
    def num_steps(self) -> int:
        return self._counters.steps

    @property
    def tokens_computed(self) -> int:
        return self._counters.tokens_computed

    def wait_until(self, time: float) -> None:
        """Let time pass without work."""
        self.clock_.advance(max(0.0, time - self.clock()))

    def begin(self) -> bool:
        """Begin a step, or a stretch of them. Return False if there is nothing to do."""
        self._outputs, self._failures = self._failures + self._time_out(), []
        self._unfinished.clear()
        self._plan = plan = self.scheduler.schedule()
        self.ends_at = self.clock()
        self.prompts = ()
        if not plan.sequences:
            return bool(self._outputs)
        if plan.num_decoding == len(plan.sequences) and self._begin_stretch(plan):
            return True
        seconds = self._costs.seconds(_shape(plan)) * self.slowdown
        self.clock_.advance(seconds)
        self.scheduler.recovery.record_step(sum(plan.chunks), seconds)
        self._end_step(plan)
        self.ends_at = self.clock()
        return True

    def interrupt(self, time: float) -> bool:
        """End the current stretch with the step that runs at `time`. Return whether this changes `ends_at`."""
        stretch = self._stretch
        if stretch is None:
            return False
        steps = stretch.steps_before(time)
        if steps == stretch.steps:
            return False
        stretch.steps = steps
        self.ends_at = stretch.begun + stretch.seconds(steps)
        return True

    @property
    def is_skipping(self) -> bool:
        """Return whether `interrupt` may end the current steps sooner."""
        return self._stretch is not None

    @property
    def can_admit(self) -> bool:
        """Return whether a sequence may be admitted by the next step: there is a free slot."""
        return len(self.scheduler.running) < self.scheduler.max_running

    def settle(self) -> None:
        """Compute what is left of the current stretch, so that requests can be aborted. `finish` returns the tokens."""
        if (stretch := self._stretch) is None:
            return
        self._stretch = None
        steps, count = stretch.steps, len(stretch.sequences)
        if count >= FULL_STEP:
            for i in range(steps):
                self.scheduler.recovery.record_step(count, stretch.first + i * stretch.growth)
        self.clock_.advance(stretch.begun + stretch.seconds(steps) - self.clock())
        self._unfinished.update(seq.id for seq in stretch.sequences)
        self._decode(stretch.sequences, steps)
        self._counters.steps += steps

    def finish(self) -> list[TokenOutput]:
        """End the current step at `ends_at`. Return first and last tokens of requests, and those that failed."""
        self.settle()
        self._unfinished.clear()
        outputs, self._outputs = self._outputs, []
        return outputs

    def delivered(self, time: float) -> dict[str, int]:
        """Return the number of output tokens of each request that had been computed by `time`, if the engine ends now.

        Those of the current step are lost. After this, nothing but the cache may be used.
        """
        if (stretch := self._stretch) is not None:
            stretch.steps = stretch.steps_before(time)
            self.settle()
        return {id: seq.num_outputs - (id in self._unfinished) for id, seq in self._live.items()}

    def arrived(self, id: str) -> int:
        """Return the number of a live request's output tokens without that of the current step. Call `settle` first."""
        seq = self._live.get(id)
        return 0 if seq is None else seq.num_outputs - (id in self._unfinished)

    def _problem(self, request: EngineRequest, tokens: "array[int]") -> str | None:
        """Return the reason why a request cannot be served. All tokens of simulated texts are in the vocabulary."""
        if not 0 < len(tokens) < self.max_model_len:
            return f"the prompt must have from 1 to {self.max_model_len - 1} tokens, not {len(request.prompt)}"
        return None

    def _begin_stretch(self, plan: StepPlan) -> bool:
        """Begin the stretch of steps like `plan`. Return False if only this step is known to be like it."""
        scheduler, sequences = self.scheduler, plan.sequences
        count = len(sequences)
        if not self._can_skip or self.reports_all or count < len(scheduler.running):
            return False
        if scheduler.num_waiting and self.can_admit and not scheduler.is_short_of_pages:
            return False
        if any(_is_new(seq) for seq in sequences):
            return False
        steps = min(seq.max_tokens - len(seq.tokens) for seq in sequences)
        if count * (steps // self.kv.page_size + 1) > self.kv.pool.num_available:
            return False
        seen = sum(len(seq.tokens) for seq in sequences)
        first = self._costs.seconds(Shape(count, count, count, seen, seen)) * self.slowdown
        growth = (self._costs.kv_token_us + self._costs.pair_us) * count / 1e6 * self.slowdown
        self._stretch = stretch = Stretch(sequences, self.clock(), first, growth, max(1, steps))
        if (deadline := self._deadlines.next) is not None:
            stretch.steps = stretch.steps_before(deadline)
        self.ends_at = stretch.begun + stretch.seconds(stretch.steps)
        return True

    def _end_step(self, plan: StepPlan) -> None:
        """Append the tokens of a step with prompts."""
        decoding = plan.num_decoding
        self._counters.steps += 1
        self._unfinished.update(seq.id for i, seq in enumerate(plan.sequences) if plan.completes(i))
        self._decode(plan.sequences[:decoding], 1)
        prompts = StepPlan(plan.sequences[decoding:], plan.chunks[decoding:])
        self.prompts = tuple(seq.id for seq in prompts.sequences)
        samples = [next_token(seq.tokens[-1]) for i, seq in enumerate(prompts.sequences) if prompts.completes(i)]
        begins = [seq.num_computed for seq in prompts.sequences]
        first_rows = [0, *accumulate(map(prompts.completes, range(len(begins))))][: len(begins)]
        self._outputs += self._advance(prompts, begins, first_rows, StepResult(np.array(samples, np.int32)))

    def _decode(self, sequences: list[Sequence], steps: int) -> None:
        """Append `steps` tokens to each sequence, with which it may end."""
        if not sequences:
            return
        tokens = continuations(np.array([seq.tokens[-1] for seq in sequences], np.int64), steps).astype(np.int32)
        content, width, page_size = memoryview(tokens.tobytes()), 4 * steps, self.kv.page_size
        for i, seq in enumerate(sequences):
            before, computed = seq.num_computed, seq.num_computed + steps
            is_last = len(seq.tokens) + steps >= seq.max_tokens
            is_first = _is_new(seq)
            seq.tokens.frombytes(content[i * width : (i + 1) * width - 4 * is_last])
            seq.num_computed = computed
            if before // page_size < computed // page_size:
                self.kv.extend(seq.page_table, computed)
                self.kv.commit(seq.page_table, computed)
            elif computed > len(seq.page_table.pages) * page_size:
                self.kv.extend(seq.page_table, computed)
            if is_last:
                self._outputs.append(self._append(seq, int(tokens[i, -1]), _NO_RESULT, 0))
            elif is_first or self.reports_all:
                self._outputs.append(TokenOutput(seq.id, seq.tokens[-1], cached_tokens=seq.cached_tokens))
        self._counters.tokens_computed += steps * len(sequences)
        self._counters.tokens_generated += steps * len(sequences)


def _is_new(seq: Sequence) -> bool:
    """Return whether a sequence has no token of this engine yet: the last token of its prompt is computed alone."""
    return len(seq.tokens) == seq.num_prompt + len(seq.request.output)


def _shape(plan: StepPlan) -> Shape:
    """Return the shape of a step, as Shape.of does from its batch."""
    seen = pairs = sum(len(seq.tokens) for seq in plan.sequences[: plan.num_decoding])
    sampled = plan.num_decoding
    for i in range(plan.num_decoding, len(plan.sequences)):
        chunk, before = plan.chunks[i], plan.sequences[i].num_computed
        seen += before + chunk
        pairs += chunk * before + chunk * (chunk + 1) // 2
        sampled += plan.completes(i)
    return Shape(len(plan.sequences), sum(plan.chunks), sampled, seen, pairs)
