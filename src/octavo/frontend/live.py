"""A live request as its user sees it: text, stop strings, logprobs, metrics, made of an engine's token outputs."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.engine.messages import EngineRequest, TokenLogprobs, TokenOutput
from octavo.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from octavo.params import SamplingParams
from octavo.text import Detokenizer, Tokenizer

from .stop_strings import StopStrings

if TYPE_CHECKING:
    from .kv_states import KVState


@dataclass(slots=True)
class LiveCompletion:
    """One completion of a request: what the engine was asked for it, and all that has come of it."""

    request: EngineRequest
    index: int
    detokenizer: Detokenizer
    stops: StopStrings
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)  # pieces
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def output(self, tokens_from: int = 0, text_from: int = 0) -> CompletionOutput:
        """All of it, or what is new since so many tokens and pieces of text."""
        wanted = self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self.text[text_from:]),
            token_ids=self.token_ids[tokens_from:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=self.logprobs[tokens_from:] if wanted else None,
            cumulative_logprob=self.cumulative_logprob if wanted else None,
        )


@dataclass(slots=True)
class LiveRequest:
    """A request until its last token. `sink` is called with an increment for every step that brought something,
    or with the error that ended the request."""

    id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    tokenizer: Tokenizer
    sink: Callable[["LiveRequest", RequestOutput | Exception], None]
    completions: list[LiveCompletion]
    metrics: RequestMetrics
    state: "KVState | None" = None  # that the prompt begins with

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason for completion in self.completions)

    @property
    def num_tokens(self) -> int:
        """Output tokens so far."""
        return sum(len(completion.token_ids) for completion in self.completions)

    def whole(self) -> RequestOutput:
        """Everything so far."""
        return self._output([completion.output() for completion in self.completions])

    def advance(self, completion: LiveCompletion, output: TokenOutput) -> RequestOutput:
        """Take in one token: the increment it makes. A stop string may end the completion before the engine does."""
        now = time.time()
        tokens_from, text_from = len(completion.token_ids), len(completion.text)
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = now
            self.metrics.cached_tokens = output.cached_tokens
        if output.token >= 0:
            self._take_token(completion, output)
        if output.finish_reason and not completion.finish_reason:
            completion.text.append(completion.stops.flush(completion.detokenizer.flush()))
            completion.finish_reason = output.finish_reason  # type: ignore[assignment]
            completion.stop_reason = output.stop_token
        if self.finished:
            self.metrics.finished_time = now
        return self._output([completion.output(tokens_from, text_from)])

    def abort(self) -> RequestOutput:
        """End what is unfinished: the increment that says so."""
        unfinished = [completion for completion in self.completions if not completion.finish_reason]
        for completion in unfinished:
            completion.finish_reason = "abort"
        self.metrics.finished_time = time.time()
        return self._output([c.output(len(c.token_ids), len(c.text)) for c in unfinished])

    def _take_token(self, completion: LiveCompletion, output: TokenOutput) -> None:
        completion.token_ids.append(output.token)
        if output.logprobs is not None:
            completion.logprobs.append(self._logprobs(output.token, output.logprobs))
            completion.cumulative_logprob += output.logprobs.logprob
        if output.finish_reason == "stop":
            return  # the end-of-sequence or stop token is no part of the text
        text = completion.detokenizer.push(output.token)
        piece, stop = completion.stops.push(text, armed=len(completion.token_ids) >= self.params.min_tokens)
        if piece:
            completion.text.append(piece)
        if stop is not None:
            completion.finish_reason, completion.stop_reason = "stop", stop

    def _logprobs(self, token: int, got: TokenLogprobs) -> dict[int, Logprob]:
        name = self.tokenizer.token_text
        entry = {token: Logprob(got.logprob, got.rank, name(token))}
        for rank, (other, logprob) in enumerate(zip(got.top_tokens, got.top_logprobs, strict=True), 1):
            entry.setdefault(other, Logprob(logprob, rank, name(other)))
        return entry

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            metrics=self.metrics,
            seed=self.seed,
        )
