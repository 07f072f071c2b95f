"""Counters: what an engine has done since its start."""

from bisect import bisect_left
from dataclasses import dataclass, field

from .messages import PREEMPTIONS, STEP_TOKENS
from .speculation import FREE_ROWS


@dataclass(slots=True)
class Counters:
    """The counters of an engine, which EngineStats describes under the same names."""

    steps: int = 0
    tokens_computed: int = 0
    tokens_generated: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    step_seconds: float = 0.0
    backend_seconds: float = 0.0
    damaged: int = 0
    step_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))
    preempted: list[int] = field(default_factory=lambda: [0] * (len(PREEMPTIONS) + 1))
    preemptions_of_ended: int = 0
    accepted: list[int] = field(default_factory=lambda: [0] * (FREE_ROWS + 1))

    def count_step(self, rows: int, seconds: float, backend_seconds: float) -> None:
        """Count a step of `rows` rows, which took `seconds`, of which `backend_seconds` in the backend."""
        self.steps += 1
        self.step_tokens[bisect_left(STEP_TOKENS, rows)] += 1
        self.step_seconds += seconds
        self.backend_seconds += backend_seconds

    def count_prompt(self, tokens: int, cached: int) -> None:
        """Count a prompt that is computed, of whose tokens `cached` were found in the prefix cache."""
        self.prompt_tokens += tokens
        self.cached_tokens += cached

    def count_draft(self, tokens: int, accepted: int) -> None:
        """Count a draft, of whose tokens the first `accepted` were accepted."""
        self.draft_tokens += tokens
        self.accepted_tokens += accepted
        self.accepted[accepted] += 1

    def count_ended(self, preemptions: int) -> None:
        """Count a sequence that has ended after so many preemptions."""
        self.preempted[bisect_left(PREEMPTIONS, preemptions)] += 1
        self.preemptions_of_ended += preemptions
