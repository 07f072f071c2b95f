"""What a request brings back, with vLLM's names."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability in nats, of the model's raw distribution. `rank`: 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt. In a stream, `text` and `token_ids` hold the new part only.

    finish_reason: None while running; "stop" (end of sequence, a stop string or token), "length", "abort", "error".
    stop_reason: the stop string or token id that ended it; None if end-of-sequence did.
    logprobs: per token, token id -> Logprob, the sampled token first; None if not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds of time.time(), None until it happens. `cached_tokens`: of the prompt, not computed again."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    cached_tokens: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """A request and what has come of it. `prompt` is None if the prompt was given as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    seed: int = field(default=0)  # the one given, or the one drawn

    @property
    def text(self) -> str:
        """The text of the first completion."""
        return self.outputs[0].text
