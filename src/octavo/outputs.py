"""Outputs of requests, with vLLM's names."""

from dataclasses import dataclass, field
from typing import Literal

from .errors import OctavoError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one position.

    Attributes:
        logprob: In nats, under the model's raw distribution: before temperature, truncation and penalties.
        rank: 1 is the most likely token of the vocabulary.
        decoded_token: The token as text.
    """

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt. In a stream, `text`, `token_ids` and `logprobs` hold only the new part.

    Attributes:
        index: The completion's index among the request's `n`.
        finish_reason: "stop" (end of sequence, a stop string or a stop token), "length", "abort" or "error"; None while
            the completion is running.
        stop_reason: The stop string or token id that ended the completion; None if it was end-of-sequence.
        logprobs: For each token, a map of token id to Logprob, the sampled token first; None if not requested.
        cumulative_logprob: The sum of the sampled tokens' log-probabilities; None if not requested.
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
    """The times at which a request reached each stage, in seconds since the epoch (`time.time()`); None before that.

    Attributes:
        replica: The engine that computed the first token, such as "engine 1", if the model has several.
        cached_tokens: Tokens of the prompt that were found in the prefix cache.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    cached_tokens: int = 0
    replica: str | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Return the seconds from arrival to the first token, or None before there is one."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """A request and its completions.

    Attributes:
        prompt: The prompt's text; None if the prompt was given as token ids.
        finished: Whether every completion has ended.
        seed: The seed of sampling: the request's, or the one drawn for it.
        prompt_logprobs: For each token of the prompt, a map of token id to Logprob, the prompt's token first; None for
            the first token. None if not requested, or before the first token of the output.
        error: Why the prompt was refused or its request failed, in outputs of `generate_iter`; the single completion
            then has no text and the finish_reason "error". Other methods raise the error.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    seed: int = field(default=0)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: OctavoError | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Return the number of the prompt's tokens that were found in the prefix cache."""
        return self.metrics.cached_tokens

    @property
    def text(self) -> str:
        """Return the text of the first completion."""
        return self.outputs[0].text
