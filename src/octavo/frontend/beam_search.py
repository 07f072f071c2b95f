"""Beam search: rounds of requests for one token each, whose likeliest tokens extend the beams.

The request of a beam finds the pages of all its tokens but the last in the prefix cache, so beams share pages and a
round computes one token per beam. A request's logprobs do not depend on other requests; so neither does a search.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from octavo.config import EngineConfig
from octavo.engine.messages import EngineInfo
from octavo.errors import RequestTimeout
from octavo.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
)
from octavo.params import BeamSearchParams, SamplingParams
from octavo.text import Tokenizer

from .requests import Request


@dataclass(frozen=True, slots=True)
class Beam:
    """A sequence of tokens, and the sum of the logprobs of its output."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cum_logprob: float = 0.0
    finish_reason: FinishReason | None = None

    def extended(self, token: int, entry: dict[int, Logprob], finish_reason: FinishReason | None = None) -> "Beam":
        """Return the beam with one more token, whose logprob is in `entry`."""
        cum_logprob = self.cum_logprob + entry[token].logprob
        return Beam([*self.tokens, token], [*self.logprobs, entry], cum_logprob, finish_reason)


class PromptSearch:
    """The beam search for one prompt.

    Each round ranks the continuations of all beams by their sums of logprobs. End-of-sequence tokens among the first
    `beam_width` finish a beam; the `beam_width` best other continuations are the next beams. Finished beams are ranked
    by sum / length ** length_penalty, where the length counts the output's tokens. The search ends when no beam can
    become better than the finished ones, or at the limit. This is the search of transformers with
    early_stopping="never".

    Args:
        eos: the tokens that finish a beam.
        limit: maximum tokens of the output.
    """

    def __init__(self, prompt: list[int], params: BeamSearchParams, eos: frozenset[int], limit: int):
        self._params, self._eos, self._limit, self._num_prompt = params, eos, limit, len(prompt)
        self.beams = [Beam(prompt)]  # those to be extended; none when the search has ended
        self.finished: list[Beam] = []  # the best ones, the best one first

    def advance(self, entries: Sequence[dict[int, Logprob]]) -> None:
        """Extend the beams. `entries` has the likeliest next tokens of each beam, with their logprobs."""
        candidates = [
            (beam.cum_logprob + logprob.logprob, beam, token, entry)
            for beam, entry in zip(self.beams, entries, strict=True)
            for token, logprob in entry.items()
        ]
        candidates.sort(key=lambda candidate: -candidate[0])  # equal ones stay in order: of beams, then of likelihood
        self.beams, width = [], self._params.beam_width
        for rank, (_, beam, token, entry) in enumerate(candidates):
            if token not in self._eos:
                self.beams.append(beam.extended(token, entry))
            elif rank < width:
                self._finish(beam.extended(token, entry, "stop"))
            if len(self.beams) == width:
                break
        length = len(self.beams[0].tokens) - self._num_prompt if self.beams else self._limit
        if length == self._limit:
            for beam in self.beams:
                self._finish(Beam(beam.tokens, beam.logprobs, beam.cum_logprob, "length"))
        if length == self._limit or self._is_decided(length):
            self.beams = []

    def _is_decided(self, length: int) -> bool:
        """Return whether no extension of the beams, which have `length` tokens, can beat the finished ones."""
        if len(self.finished) < self._params.beam_width:
            return False
        best = max(beam.cum_logprob for beam in self.beams)  # of any extension too, since logprobs are negative
        most = max(self._score(best, length + 1), self._score(best, self._limit))
        return self._score_of(self.finished[-1]) >= most

    def _finish(self, beam: Beam) -> None:
        self.finished.append(beam)
        self.finished.sort(key=lambda each: -self._score_of(each))
        del self.finished[self._params.beam_width :]

    def _score_of(self, beam: Beam) -> float:
        return self._score(beam.cum_logprob, len(beam.tokens) - self._num_prompt)

    def _score(self, cum_logprob: float, length: int) -> float:
        return cum_logprob / math.pow(length, self._params.length_penalty)


class BeamSearch:
    """The beam searches for several prompts, in common rounds.

    As long as there are `tokens`, run `requests` and pass their outputs to `advance`. Then `outputs` has the results.

    Args:
        prompts: the prompts with their terms of service; their sampling parameters are not used.
        tokens: the token ids of each prompt.
        config: the settings; request_timeout and max_new_tokens apply.
    """

    def __init__(
        self,
        prompts: list[Request],
        tokens: list[list[int]],
        params: BeamSearchParams,
        tokenizer: Tokenizer,
        info: EngineInfo,
        config: EngineConfig,
    ):
        self._prompts, self._params, self._tokenizer = prompts, params, tokenizer
        self._timeout = config.request_timeout
        self._eos = frozenset[int]() if params.ignore_eos else tokenizer.eos_token_ids
        self._begun = time.monotonic()
        self._first: list[RequestOutput] = []  # the outputs of the first round
        limit = min(params.max_tokens, config.max_new_tokens or params.max_tokens)
        self._searches = [
            PromptSearch(prompt, params, self._eos, min(limit, info.max_model_len - len(prompt))) for prompt in tokens
        ]
        # Enough continuations of each beam for beam_width ones that do not finish it.
        count = min(max(2, 1 + len(self._eos)) * params.beam_width, info.vocab_size)
        self._step = SamplingParams(
            temperature=0, max_tokens=1, logprobs=count, seed=0, ignore_eos=True, detokenize=False
        )

    @property
    def tokens(self) -> list[list[int]]:
        """Return the token ids of all beams, which are the prompts of `requests`; none after the last round."""
        return [beam.tokens for search in self._searches for beam in search.beams]

    def requests(self) -> list[Request]:
        """Return the requests of the next round. Raises RequestTimeout."""
        return [
            Request(beam.tokens, self._step, msgspec.structs.replace(prompt.terms, timeout=self._time_left(prompt)))
            for prompt, search in zip(self._prompts, self._searches, strict=True)
            for beam in search.beams
        ]

    def advance(self, outputs: list[RequestOutput]) -> None:
        """Extend the beams by the outputs of `requests`."""
        self._first = self._first or outputs
        done = 0
        for search in self._searches:
            entries = [(output.outputs[0].logprobs or [{}])[0] for output in outputs[done : done + len(search.beams)]]
            done += len(search.beams)
            if search.beams:
                search.advance(entries)

    def outputs(self) -> list[RequestOutput]:
        """Return the results as outputs of ordinary requests, with the best beams as completions."""
        return [self._output(*each) for each in zip(self._prompts, self._searches, self._first, strict=True)]

    def _time_left(self, prompt: Request) -> float | None:
        timeout = self._timeout if prompt.terms.timeout is None else prompt.terms.timeout
        if timeout is None:
            return None
        if (left := self._begun + timeout - time.monotonic()) <= 0:
            raise RequestTimeout(f"the request did not end within its timeout of {timeout:g} seconds")
        return left

    def _output(self, prompt: Request, search: PromptSearch, first: RequestOutput) -> RequestOutput:
        now, metrics = time.time(), first.metrics
        return RequestOutput(
            request_id=first.request_id,
            prompt=prompt.prompt if isinstance(prompt.prompt, str) else None,
            prompt_token_ids=first.prompt_token_ids,
            outputs=[self._completion(*each, len(first.prompt_token_ids)) for each in enumerate(search.finished)],
            finished=True,
            metrics=RequestMetrics(
                metrics.arrival_time, metrics.first_token_time, now, metrics.cached_tokens, metrics.replica
            ),
        )

    def _completion(self, index: int, beam: Beam, num_prompt: int) -> CompletionOutput:
        tokens = beam.tokens[num_prompt:]
        at_end = beam.finish_reason == "stop"
        shown = tokens[:-1] if at_end and not self._params.include_stop_str_in_output else tokens
        skip = self._params.skip_special_tokens and not (at_end and self._params.include_stop_str_in_output)
        return CompletionOutput(
            index=index,
            text=self._tokenizer.decode(shown, skip_special_tokens=skip),
            token_ids=tokens,
            finish_reason=beam.finish_reason,
            stop_reason=tokens[-1] if at_end else None,
            logprobs=beam.logprobs,
            cumulative_logprob=beam.cum_logprob,
        )


def beam_search_output(output: RequestOutput, tokenizer: Tokenizer) -> BeamSearchOutput:
    """Return the results of a search in the form of vLLM's LLM.beam_search."""

    def sequence(completion: CompletionOutput) -> BeamSearchSequence:
        tokens = output.prompt_token_ids + completion.token_ids
        return BeamSearchSequence(
            tokens=tokens,
            logprobs=completion.logprobs or [],
            cum_logprob=completion.cumulative_logprob or 0.0,
            text=tokenizer.decode(tokens),
            finish_reason=completion.finish_reason,
            stop_reason=completion.token_ids[-1] if completion.finish_reason == "stop" else None,
        )

    return BeamSearchOutput([sequence(completion) for completion in output.outputs])
