"""Live requests: convert the engine's token outputs to text, logprobs and metrics, and check stop strings."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from octavo.engine.messages import EngineRequest, PageSource, TokenOutput
from octavo.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from octavo.params import RequestOutputKind, SamplingParams
from octavo.text import Detokenizer, Tokenizer
from octavo.text.stop_strings import StopStrings

from .logprobs import LogprobRows, PromptLogprobs
from .repetition import RepetitionDetector

if TYPE_CHECKING:
    from octavo.states import KVState

    from .replica import Replica


@dataclass(slots=True)
class LiveCompletion:
    """One completion of a request: the message to the engine, and all output so far.

    Attributes:
        has_logprobs: whether the user wants logprobs; the engine also computes them to rank completions (best_of).
        num_metered, metered_at: number of tokens, and time.monotonic(), at the Meter's latest look; 0 before it.
    """

    request: EngineRequest
    index: int
    detokenizer: Detokenizer
    stops: StopStrings
    repetition: RepetitionDetector | None = None
    has_logprobs: bool = False
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)  # pieces
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_metered: int = 0
    metered_at: float = 0.0

    def output(self) -> CompletionOutput:
        """Return the whole output so far."""
        return self.increment("".join(self.text), list(self.token_ids), list(self.logprobs))

    def increment(self, text: str, tokens: list[int], logprobs: list[dict[int, Logprob]]) -> CompletionOutput:
        """Return a new part of the completion, with its current status."""
        return CompletionOutput(
            self.index,
            text,
            tokens,
            self.finish_reason,
            self.stop_reason,
            logprobs if self.has_logprobs else None,
            self.cumulative_logprob if self.request.params.logprobs is not None else None,
        )


Sink = Callable[["LiveRequest", RequestOutput | Exception], None]


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request until its last token.

    Attributes:
        sink: called with each output (see `advance`), or with the error that ended the request.
        arrival: time of arrival, in seconds of time.monotonic().
        state: the KV state that the prompt begins with.
        replica: the replica that the request was sent to, or waits for after a crash; None if any replica may take it.
        sent: whether the request was sent to the replica's current engine.
        was_sent: whether the request was ever sent to an engine.
        tokens_to_compute: tokens to compute before the first token, as far as the frontend knows the engine's cache.
        progress: tokens that the current engine has computed for the request; not counted beyond TRIAL_TOKENS.
        crashes: number of engines that failed while they served the request.
        prompt_logprobs, pooled: see RequestOutput.
        prompt_metered: whether the Meter has counted the prompt.
        source: the engine from which that of `replica` may fetch pages.
    """

    id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    tokenizer: Tokenizer
    sink: Sink
    completions: list[LiveCompletion]
    metrics: RequestMetrics
    arrival: float
    timeout: float | None = None
    state: "KVState | None" = None
    finished: bool = False
    replica: "Replica | None" = None
    sent: bool = False
    was_sent: bool = False
    tokens_to_compute: int = 0
    progress: int = 0
    crashes: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    pooled: bytes | None = None
    prompt_metered: bool = False
    source: PageSource | None = None

    @property
    def engine_ids(self) -> list[str]:
        """Return the engine's ids of the completions."""
        return [completion.request.id for completion in self.completions]

    @property
    def num_tokens(self) -> int:
        """Return the number of output tokens so far."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def num_sequence_tokens(self) -> int:
        """Return the number of tokens with which an engine would continue the first unfinished completion."""
        return len(self.prompt_token_ids) + len(self.unfinished[0].token_ids)

    @property
    def unfinished(self) -> list[LiveCompletion]:
        """Return the completions that have not ended."""
        return [completion for completion in self.completions if not completion.finish_reason]

    def is_fetching_from(self, replica: "Replica") -> bool:
        """Return whether the engine of `self.replica` may be fetching pages from that of another replica."""
        address = self.source.address if self.source is not None and self.replica is not None else ""
        return bool(address) and address == replica.load.address and not self.progress

    def owed(self) -> list[EngineRequest]:
        """Return the messages with which an engine continues each unfinished completion after its last token."""
        age = time.monotonic() - self.arrival
        return [
            msgspec.structs.replace(completion.request, output=list(completion.token_ids), age=age, source=self.source)
            for completion in self.unfinished
        ]

    def whole(self) -> RequestOutput:
        """Return the whole output so far."""
        return self._output([completion.output() for completion in self.completions])

    def advance(self, completion: LiveCompletion, output: TokenOutput) -> RequestOutput | None:
        """Add one token of the engine, and return the next output of the kind that the request wants; None for none.

        A stop string or a repetition may end the completion earlier than the engine would.
        """
        if output.prompt_logprobs is not None:
            rows = LogprobRows(output.prompt_logprobs, self.tokenizer.token_text)
            self.prompt_logprobs = PromptLogprobs(self.prompt_token_ids, rows)
        if output.pooled is not None:
            self.pooled = output.pooled
        if self.params.max_tokens == 0 and output.token >= 0:
            output = msgspec.structs.replace(output, token=-1, finish_reason="length", stop_token=None, logprobs=None)
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = self._wall_time()
            self.metrics.cached_tokens = output.cached_tokens
            self.metrics.time_in_queue = output.time_in_queue
        text, tokens, logprobs = "", [], []
        if output.token >= 0:
            tokens.append(output.token)
            if output.logprobs is not None:
                entry = LogprobRows(output.logprobs, self.tokenizer.token_text).entry(0, output.token)
                logprobs.append(entry)
                completion.cumulative_logprob += entry[output.token].logprob
            text = self._text(completion, output)
        completion.token_ids += tokens
        completion.logprobs += logprobs
        if not completion.finish_reason and self._repeats(completion, output):
            text += completion.stops.flush(completion.detokenizer.flush())
            self._finish(completion, "repetition", "repetition_detected")
        if output.finish_reason and not completion.finish_reason:
            text += completion.stops.flush(completion.detokenizer.flush())
            self._finish(completion, output.finish_reason, output.stop_token)
        if text:
            completion.text.append(text)
        if self.finished and self.params.num_completions > self.params.n:
            self._keep_best()
        match self.params.output_kind:
            case RequestOutputKind.DELTA:
                return self._output([completion.increment(text, tokens, logprobs)])
            case RequestOutputKind.CUMULATIVE:
                return self._output([completion.output()])
            case RequestOutputKind.FINAL_ONLY:
                return self.whole() if self.finished else None

    def abort(self) -> RequestOutput:
        """End all unfinished completions with finish_reason "abort", and return their last output."""
        unfinished = self.unfinished
        for completion in unfinished:
            self._finish(completion, "abort", None)
        if self.params.output_kind is RequestOutputKind.DELTA:
            return self._output([completion.increment("", [], []) for completion in unfinished])
        return self.whole()

    def _finish(self, completion: LiveCompletion, reason: str, stop: str | int | None) -> None:
        completion.finish_reason, completion.stop_reason = reason, stop  # type: ignore[assignment]
        self.finished = all(completion.finish_reason for completion in self.completions)
        if self.finished:
            self.metrics.finished_time = self._wall_time()

    def _repeats(self, completion: LiveCompletion, output: TokenOutput) -> bool:
        """Return whether the output repeats itself, and may end, after one more token."""
        detector = completion.repetition
        if detector is None or output.token < 0 or not detector.push(completion.token_ids):
            return False
        return not output.finish_reason and len(completion.token_ids) >= self.params.min_tokens

    def _keep_best(self) -> None:
        """Drop all but the n completions with the highest cumulative logprob (best_of)."""
        self.completions.sort(key=lambda completion: -completion.cumulative_logprob)
        del self.completions[self.params.n :]
        for index, completion in enumerate(self.completions):
            completion.index = index

    def _wall_time(self) -> float:
        """Return the arrival's wall-clock time plus the time since then, in case the clock was set in between."""
        return self.metrics.arrival_time + time.monotonic() - self.arrival

    def _text(self, completion: LiveCompletion, output: TokenOutput) -> str:
        """Return the text that is final after one more token."""
        params = self.params
        shows_end = output.in_text or params.include_stop_str_in_output
        if not params.detokenize or (output.finish_reason == "stop" and not shows_end):
            return ""  # the end-of-sequence or stop token is not part of the text
        text = completion.detokenizer.push(output.token)
        armed = len(completion.token_ids) + 1 >= params.min_tokens
        text, stop = completion.stops.push(text, armed)
        if stop is None:
            return text
        self._finish(completion, "stop", stop)
        return text + stop if params.include_stop_str_in_output else text

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            metrics=self.metrics,
            seed=self.seed,
            prompt_logprobs=self.prompt_logprobs,
            pooled=self.pooled,
        )
