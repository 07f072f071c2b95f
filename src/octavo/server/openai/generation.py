"""What completions and chat completions share: one HTTP request as requests to the engine."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from octavo.async_llm import AsyncLLM, Increment
from octavo.frontend.requests import Request, make_requests
from octavo.outputs import RequestOutput
from octavo.params import SamplingParams
from octavo.server.errors import ApiError
from octavo.text import Tokenizer

from .kv_states import Continuation
from .replies import KVCacheState, PromptTokensDetails, Usage

LONG_TEXT = 20_000  # characters: tokenizing takes about 1 µs for each


@dataclass(frozen=True)
class Generation:
    """Prompts to complete with the same parameters and terms, and the marks that every reply about them bears."""

    llm: AsyncLLM
    prompts: list[list[int]]
    params: SamplingParams
    terms: dict[str, Any]  # of ServiceTerms; and kv_cache_state, if they go on from one
    id: str
    continuation: Continuation | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        return self.llm.config.model_name

    @property
    def fingerprint(self) -> str:
        """Names what decides the tokens beside the request: under the same one, the same seed brings the same text."""
        return f"fp_{self.llm.info.fingerprint[:12]}"

    def hear(self, output: RequestOutput) -> None:
        """An increment, or a whole output, which is to be told to the client."""
        if self.continuation is not None:
            self.continuation.hear(output)

    def kept_state(self) -> KVCacheState | msgspec.UnsetType | None:
        """A reply's kv_cache_state, when all of it was heard."""
        return msgspec.UNSET if self.continuation is None else self.continuation.kept

    async def whole(self) -> list[RequestOutput]:
        return await self.llm.generate_requests(self._requests())

    def increments(self) -> AsyncGenerator[list[Increment], None]:
        """Increments of all prompts as they come. Closing the generator aborts what still runs."""
        return self.llm.stream_requests(self._requests())

    def _requests(self) -> list[Request]:
        terms: Any = dict(self.terms)
        state, priority = terms.pop("kv_cache_state", None), terms.pop("priority", 0)
        return make_requests(self.prompts, self.params, self.params, priority, terms, state)


@dataclass
class Tally:
    """Counts a stream's tokens."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, output: RequestOutput) -> None:
        """An increment, or a whole output."""
        for completion in output.outputs:
            self.completion_tokens += len(completion.token_ids)
        if output.finished:
            self.prompt_tokens += len(output.prompt_token_ids)
            self.cached_tokens += output.metrics.cached_tokens

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(self.cached_tokens),
        )


def check_model(llm: AsyncLLM, name: str | None) -> None:
    """Raises ApiError 404 for a model that is not served; no name means the one that is."""
    served = llm.config.model_name
    if name is not None and name != served:
        raise ApiError(404, f"the model {name!r} is not served here; {served!r} is", "model", "model_not_found")


async def tokenized(
    tokenizer: Tokenizer, prompts: list[str | list[int]], add_special_tokens: bool = True
) -> list[list[int]]:
    """Prompts as token ids. Long text is left to a thread, with the GIL released: others are served meanwhile."""

    def encode() -> list[list[int]]:
        return [tokenizer.encode(p, add_special_tokens) if isinstance(p, str) else p for p in prompts]

    is_long = sum(len(prompt) for prompt in prompts if isinstance(prompt, str)) > LONG_TEXT
    return await asyncio.to_thread(encode) if is_long else encode()


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
