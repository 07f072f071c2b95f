"""Outputs of requests, with vLLM's names."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import msgspec

from .errors import OctavoError

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]


class Logprob(msgspec.Struct, frozen=True, gc=False):
    """The log-probability of one token at one position. A reply may have hundreds of thousands of them.

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
        finish_reason: "stop" (end of sequence, a stop string or a stop token), "length", "repetition" (see
            repetition_detection), "abort" or "error"; None while the completion is running.
        stop_reason: The stop string or token id that ended the completion, or "repetition_detected"; None if it was
            end-of-sequence.
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
        time_in_queue: Seconds from arrival until an engine began to compute the prompt; None before the first token.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    cached_tokens: int = 0
    replica: str | None = None
    time_in_queue: float | None = None

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
            the first token. None if not requested, or before the first token of the output. The maps are made when
            they are read.
        pooled: The vector of a pooled request as float32 bytes, of which PoolingRequestOutput is made; otherwise None.
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
    prompt_logprobs: Sequence[dict[int, Logprob] | None] | None = None
    pooled: bytes | None = None
    error: OctavoError | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Return the number of the prompt's tokens that were found in the prefix cache."""
        return self.metrics.cached_tokens

    @property
    def text(self) -> str:
        """Return the text of the first completion."""
        return self.outputs[0].text


@dataclass(slots=True)
class PoolingOutput:
    """A pooled prompt. `data` is a float32 array [dimensions]."""

    data: Any


@dataclass(slots=True)
class EmbeddingOutput:
    """The embedding of a prompt."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Return the number of dimensions."""
        return len(self.embedding)


@dataclass(slots=True)
class ScoringOutput:
    """The probability, from 0 to 1, that a document answers a query."""

    score: float


Pooled = TypeVar("Pooled")


@dataclass(slots=True)
class PoolingRequestOutput(Generic[Pooled]):
    """A prompt and its pooled output: a PoolingOutput, an EmbeddingOutput or a ScoringOutput."""

    request_id: str
    outputs: Pooled
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finished: bool = True


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]


@dataclass(slots=True)
class BeamSearchSequence:
    """One result of a beam search.

    Attributes:
        tokens: The prompt's tokens and those of the output, with the end-of-sequence token if it ended the output.
        logprobs: For each token of the output, a map of token id to Logprob of the likeliest tokens.
        cum_logprob: The sum of the log-probabilities of the output's tokens.
        text: The text of `tokens`, as in vLLM.
        finish_reason: "stop" (end of sequence) or "length".
        stop_reason: The end-of-sequence token, or None.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The results of a beam search, the best one first; as many as the search is wide."""

    sequences: list[BeamSearchSequence]
