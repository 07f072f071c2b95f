"""The common part of completions and chat completions: one HTTP request as requests to the engine."""

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from octavo.async_llm import AsyncLLM, Increment
from octavo.errors import InvalidRequest
from octavo.frontend.requests import Request, encode, kept_tokens, make_requests
from octavo.outputs import Logprob, RequestOutput
from octavo.params import SamplingParams
from octavo.server.edge.access_log import RequestRecord
from octavo.text.infilling import infill
from octavo.text.offload import off_loop

from .kv_states import Continuation
from .protocol import CompletionRequest
from .replies import KVCacheState, PromptTokensDetails, Usage

MAX_PROMPT_LOGPROBS = 32_768  # of a request; converted on the event loop, in about a tenth of a second


@dataclass
class Generation:
    """Prompts to complete with the same parameters, and the fields of every reply to them.

    Args:
        prompts: token ids.
        terms: the given fields of ServiceTerms, and `kv_cache_state` if the prompt continues a state.
        record: the access log's record of the request; receives the model and token counts.
        kind: the prefix of the reply's id.
    """

    llm: AsyncLLM
    prompts: list[list[int]]
    params: SamplingParams
    terms: dict[str, Any]
    record: RequestRecord
    kind: str
    continuation: Continuation | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        """Raise InvalidRequest if the reply would have too many logprobs of prompts."""
        if (wanted := self.params.prompt_logprobs) is not None:
            count = sum(map(len, self.prompts)) * (1 + wanted)
            if count > MAX_PROMPT_LOGPROBS:
                raise InvalidRequest(
                    f"{count:,} logprobs of prompts are wanted: tokens times (1 + prompt_logprobs); the limit is "
                    f"{MAX_PROMPT_LOGPROBS:,}",
                    "prompt_logprobs",
                )
        self.id = f"{self.kind}-{uuid.uuid4().hex}"
        self.model = self.llm.config.model_name
        # Identifies everything besides the request that determines the tokens. If it and the seed are the same, so is
        # the text.
        self.fingerprint = f"fp_{self.llm.info.fingerprint[:12]}"
        self.record.model = self.model
        self.record.tenant = self.terms["tenant"]
        self.prompt_logprobs: dict[int, list[dict[int, Logprob] | None]] = {}  # by the index of the prompt
        self._known_prompts: set[str] = set()
        self.record.prompt_tokens = self.record.cached_tokens = self.record.completion_tokens = 0

    def add(self, prompt: int, output: RequestOutput) -> None:
        """Count the tokens of an increment, or of a whole output, of prompt number `prompt`."""
        record = self.record
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[prompt] = output.prompt_logprobs
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
        outputs = await self.llm.generate_requests(self._requests())
        for prompt, output in enumerate(outputs):
            self.add(prompt, output)
        return outputs

    def increments(self) -> AsyncGenerator[list[Increment], None]:
        """Return a generator of the increments of all prompts. Closing it aborts what still runs."""
        return self.llm.stream_requests(self._requests())

    def _requests(self) -> list[Request]:
        terms: Any = dict(self.terms)
        state, priority = terms.pop("kv_cache_state", None), terms.pop("priority", 0)
        return make_requests(self.prompts, self.params, self.params, priority, terms, state)


async def tokenized(
    llm: AsyncLLM,
    prompts: list[str | list[int]],
    add_special_tokens: bool = True,
    params: SamplingParams | None = None,
) -> list[list[int]]:
    """Return prompts as token ids, truncated as `params` demand. Raises InvalidRequest, PromptTooLong."""
    info = llm.info
    kept = kept_tokens(params, info) if params else None

    def tokens(prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return encode(prompt, llm.tokenizer, info, kept, add_special_tokens)
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
