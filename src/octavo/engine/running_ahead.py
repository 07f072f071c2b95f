"""Running ahead: a step is launched before the result of the step before it is read (docs/architecture.md).

This is for backends that compute steps elsewhere while the engine goes on (`Backend.runs_ahead`). They keep the token
that each slot has sampled, from which the next step takes its input.
"""

from dataclasses import dataclass, field

import numpy as np

from octavo.backends.base import Pending, StepBatch

from .scheduler import StepPlan
from .sequence import Sequence


@dataclass(slots=True)
class LaunchedStep:
    """A step whose result has not been read.

    Attributes:
        plan: what it computes.
        rows: number of its tokens.
        begins: the num_computed of each sequence before the step.
        first_rows: the first sampled row of each sequence that has any.
        pending: its result.
        began: when it was launched, or when the step before it ended if that was later, in seconds of time.monotonic().
        clock: the same on the engine's clock.
        pages: those that it writes, which are referenced until it has ended.
    """

    plan: StepPlan
    rows: int
    begins: list[int]
    first_rows: list[int] | range
    pending: Pending
    began: float
    clock: float
    pages: list[int] = field(default_factory=list)

    @property
    def prompts(self) -> list[Sequence]:
        """Return the sequences of the step that are not decoding."""
        return self.plan.sequences[self.plan.num_decoding :]


def runs_ahead(seq: Sequence, samples: bool) -> bool:
    """Return whether the next step can be launched with a sequence before the result of the launched step is read.

    | what the launched step computes | what the next one needs of it | runs ahead |
    | --- | --- | --- |
    | a part of a prompt | nothing | yes |
    | a token | the token, which the backend has | yes |
    | the last token that max_tokens allows | there is no next one | no |
    | a token with penalties, bad words, a budget of reasoning, a grammar or draft tokens | the token, here | no |
    | a part of a prompt whose logprobs are wanted, or of a pooled request | the results so far, here | no |

    A stop token, a stop string or an abort may end a sequence that runs ahead: then its row of the next step is wasted.

    Args:
        samples: whether the launched step samples a token of the sequence.
    """
    if seq.pooling is not None or seq.unscored is not None:
        return False
    if not samples:
        return True
    request, params = seq.request, seq.request.params
    waits = params.penalized or request.banned or request.thinking or params.structured_outputs or seq.draft_limit
    return not waits and len(seq.tokens) + 1 < seq.max_tokens


def rows_of(plan: StepPlan, batch: StepBatch) -> tuple[list[int], list[int] | range]:
    """Return the `begins` and the `first_rows` of a LaunchedStep."""
    if len(batch.tokens) == plan.num_decoding:  # most steps: a row for each sequence
        return batch.positions.tolist(), range(plan.num_decoding)
    first = np.searchsorted(batch.sample_rows, batch.query_start[:-1])
    return batch.positions[batch.query_start[:-1]].tolist(), first.tolist()
