"""The common part of completions and chat completions: one HTTP request as requests to the engine."""

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from octavo.async_llm import AsyncLLM, Increment
from octavo.errors import InvalidRequest
from octavo.frontend.requests import (
    Request,
    check_prompt_logprobs,
    encode,
    kept_tokens,
    make_requests,
    num_logprobs,
)
from octavo.frontend.tally import Tally
from octavo.outputs import RequestOutput
from octavo.params import BeamSearchParams, SamplingParams
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.spending import spending
from octavo.text.infilling import infill
from octavo.text.offload import off_loop

from .kv_states import Continuation
from .logprobs import EchoedLogprobs, LogprobFormat, prompt_logprobs
from .protocol import CompletionRequest, GenerationRequest
from .replies import Elements, Json, JsonInPieces, KVCacheState, PromptTokensDetails, Reply, Usage

MAX_PROMPT_LOGPROBS = 262_144  # of a request, which take about 20 MB in a reply
MAX_STREAMED_PROMPT_LOGPROBS = 32_768  # of a stream, whose first event has them all


@dataclass(frozen=True)
class ReplyOptions:
    """Which optional parts the replies to a request have.

    Attributes:
        stream: events in place of one reply.
        echo: the prompt, before each completion.
        token_ids: the token ids of prompts and outputs (return_token_ids).
        tokens_as_ids: token ids instead of texts in logprobs (return_tokens_as_token_ids).
    """

    stream: bool = False
    echo: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False

    @classmethod
    def of(cls, body: GenerationRequest, echo: bool = False) -> "ReplyOptions":
        """Return the options of a request."""
        return cls(bool(body.stream), echo, bool(body.return_token_ids), bool(body.return_tokens_as_token_ids))


@dataclass(frozen=True)
class ScoredPrompt:
    """The logprobs of a prompt in the forms of replies. `echoed` is None unless the prompt is echoed with logprobs."""

    known: Elements
    echoed: EchoedLogprobs | None

    @property
    def elements(self) -> list[Elements]:
        """Return the parts that are written in pieces."""
        return [self.known, *([self.echoed.likeliest] if self.echoed and self.echoed.likeliest else ())]


@dataclass
class Generation:
    """Prompts to complete with the same parameters, and the fields of every reply to them.

    Args:
        prompts: token ids.
        terms: the given fields of ServiceTerms, and `kv_cache_state` if the prompt continues a state.
        record: the access log's record of the request; receives the model and token counts.
        kind: the prefix of the reply's id.
        beams: the beam search that completes the prompts, in place of sampling.
    """

    llm: AsyncLLM
    prompts: list[list[int]]
    params: SamplingParams
    terms: dict[str, Any]
    record: RequestRecord
    kind: str
    continuation: Continuation | None = None
    options: ReplyOptions = ReplyOptions()
    beams: BeamSearchParams | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        """Apply the limits of the request's key. Raise InvalidRequest for too many logprobs of prompts."""
        if self.record.key is not None and (limit := self.record.key.max_new_tokens) is not None:
            self._limit_output(limit)
        if (wanted := self.params.prompt_logprobs) is not None:
            count = num_logprobs(sum(map(len, self.prompts)), wanted, self.llm.info)
            limit = MAX_STREAMED_PROMPT_LOGPROBS if self.options.stream else MAX_PROMPT_LOGPROBS
            check_prompt_logprobs(count * self.params.n, limit)
        self.id = f"{self.kind}-{uuid.uuid4().hex}"
        self.model = self.llm.config.model_name
        # Identifies everything besides the request that determines the tokens. If it and the seed are the same, so is
        # the text.
        self.fingerprint = f"fp_{self.llm.info.fingerprint[:12]}"
        self.record.model = self.model
        self.record.tenant = self.terms["tenant"]
        self.logprobs = LogprobFormat(self.llm.tokenizer, self.options.tokens_as_ids)
        self.scored: dict[int, ScoredPrompt] = {}  # by the index of the prompt
        self._known_prompts: set[str] = set()
        self.record.prompt_tokens = self.record.cached_tokens = self.record.completion_tokens = 0

    def add(self, prompt: int, output: RequestOutput) -> None:
        """Count the tokens of an increment, or of a whole output, of prompt number `prompt`."""
        record = self.record
        for completion in output.outputs:
            record.completion_tokens += len(completion.token_ids)  # type: ignore[operator]
        if output.request_id not in self._known_prompts:
            self._known_prompts.add(output.request_id)
            record.prompt_tokens += len(output.prompt_token_ids)  # type: ignore[operator]
            record.cached_tokens += output.metrics.cached_tokens  # type: ignore[operator]
            record.replica = record.replica or output.metrics.replica
            record.time_to_first_token = record.time_to_first_token or output.metrics.time_to_first_token
        if self.continuation is not None:
            self.continuation.add(output)

    @property
    def usage(self) -> Usage:
        """Return the numbers of tokens so far."""
        prompt, completion = self.record.prompt_tokens or 0, self.record.completion_tokens or 0
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(self.record.cached_tokens or 0),
        )

    def kept_state(self) -> KVCacheState | msgspec.UnsetType | None:
        """Return the reply's kv_cache_state. To be called after all output was added."""
        return msgspec.UNSET if self.continuation is None else self.continuation.kept

    async def whole(self) -> list[RequestOutput]:
        """Return the whole outputs, one per prompt. If the caller is cancelled, their requests are aborted."""
        async with self._spending() as tally:
            if self.beams is not None:
                outputs = await self._searched(self.beams, tally)
            else:
                outputs = await self.llm.generate_requests(self._requests(), tally=tally)
        for prompt, output in enumerate(outputs):
            self.add(prompt, output)
            await self._score(prompt, output)
        return outputs

    async def increments(self) -> AsyncGenerator[list[Increment], None]:
        """Yield the increments of all prompts. Closing the generator aborts what still runs.

        A beam search has one increment, when it has ended.
        """
        async with self._spending() as tally:
            if self.beams is not None:
                yield list(enumerate(await self._searched(self.beams, tally)))
                return
            async with aclosing(self.llm.stream_requests(self._requests(), tally=tally)) as steps:
                async for increments in steps:
                    for increment in increments:
                        await self._score(*increment)
                    yield increments

    def json(self, reply: Reply) -> Json | JsonInPieces:
        """Return the response with a whole reply."""
        elements = [each for scored in self.scored.values() for each in scored.elements]
        return JsonInPieces(reply, elements) if elements else Json(reply)

    def placed(self, elements: Elements) -> list[msgspec.Raw]:
        """Return the elements of an array for a reply: their stand-in, or, in a stream, all of them."""
        return [msgspec.Raw(b"".join(elements.pieces)) if self.options.stream else elements.stand_in]

    async def _score(self, prompt: int, output: RequestOutput) -> None:
        """Convert the logprobs of a prompt, once."""
        if (known := output.prompt_logprobs) is None or prompt in self.scored:
            return
        echoed, top = None, self.params.logprobs
        if self.options.echo and top is not None:
            echoed = await self.logprobs.echoed(self.prompts[prompt], known, top != 0)
        self.scored[prompt] = ScoredPrompt(await prompt_logprobs(known), echoed)

    def _limit_output(self, limit: int) -> None:
        """Let no completion have more than `limit` tokens."""
        params, beams = self.params, self.beams
        longest = limit if params.max_tokens is None else min(limit, params.max_tokens)
        shortest = min(params.min_tokens, longest)
        self.params = msgspec.structs.replace(params, max_tokens=longest, min_tokens=shortest)
        if beams is not None:
            self.beams = msgspec.structs.replace(beams, max_tokens=min(limit, beams.max_tokens))

    def _spending(self) -> AbstractAsyncContextManager[Tally | None]:
        """Reserve the tokens that the generation may take, of the limits of the request's key. Raises ApiError 429."""
        if self.record.use is None:
            return nullcontext()
        state = self.continuation.state if self.continuation else None
        before = len(state.token_ids) if state else 0
        lengths = [before + len(prompt) for prompt in self.prompts]
        if self.beams is None:
            generated = sum(self.llm.max_output(self.params, length) for length in lengths)
        else:
            generated = len(lengths) * self.beams.beam_width * self.beams.max_tokens
        return spending(self.record, self.llm, self.terms, sum(lengths), generated)

    async def _searched(self, beams: BeamSearchParams, tally: Tally | None) -> list[RequestOutput]:
        """Return the outputs of a beam search, with as many logprobs as the request wants."""
        outputs = await self.llm.beam_search_requests(self._requests(), beams, tally)
        wanted = self.llm.info.vocab_size if self.params.logprobs == -1 else self.params.logprobs
        for completion in (completion for output in outputs for completion in output.outputs):
            if wanted is None or completion.logprobs is None:
                completion.logprobs = None
                continue
            completion.logprobs = [
                {other: logprob for other, logprob in entry.items() if other == token or logprob.rank <= wanted}
                for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
            ]
        return outputs

    def _requests(self) -> list[Request]:
        terms: Any = dict(self.terms)
        state, priority = terms.pop("kv_cache_state", None), terms.pop("priority", 0)
        requests = make_requests(self.prompts, self.params, self.params, priority, terms, state)
        return [replace(request, reply_id=self.id) for request in requests]


async def tokenized(
    llm: AsyncLLM,
    prompts: list[str | list[int]],
    add_special_tokens: bool = True,
    params: SamplingParams | None = None,
    terms: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Return prompts as token ids, truncated as `params` demand. Raises InvalidRequest, PromptTooLong.

    Args:
        terms: Their tenant and cache_salt are the owner of the prompts; see Tokenizer.encode.
    """
    owner = (terms["tenant"], terms.get("cache_salt")) if terms else None
    info = llm.info
    kept = kept_tokens(params, info) if params else None

    def tokens(prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return encode(prompt, llm.tokenizer, info, kept, add_special_tokens, owner)
        return prompt if kept is None else prompt[-kept:]

    def work() -> list[list[int]]:
        return [tokens(prompt) for prompt in prompts]

    length = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return await off_loop(llm.tokenizer, length, work)


async def infilled(llm: AsyncLLM, body: CompletionRequest) -> tuple[list[list[int]], list[int]]:
    """Return prompts for the text between each prompt and `suffix`, and the tokens that end this text.

    Raises InvalidRequest, PromptTooLong.
    """
    suffix, limit = body.suffix or "", llm.info.max_model_len - 1
    texts = [text for text in body.prompt if isinstance(text, str)]
    if len(texts) < len(body.prompt) or body.kv_cache_state:
        raise InvalidRequest("suffix needs prompts of text, without kv_cache_state", "suffix")

    def work() -> list[tuple[list[int], list[int]]]:
        return [infill(llm.tokenizer, text, suffix, limit) for text in texts]

    results = await off_loop(llm.tokenizer, sum(len(text) + len(suffix) for text in texts), work)
    return [prompt for prompt, _ in results], results[0][1]
