"""What completions and chat completions share: one HTTP request as requests to the engine."""

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import msgspec

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.outputs import RequestOutput
from octavo.params import SamplingParams
from octavo.text import Tokenizer
from octavo.version import __version__

from .errors import ApiError
from .kv_states import Continuation
from .replies import KVCacheState, PromptTokensDetails, Usage

LONG_TEXT = 20_000  # characters: tokenising takes about 1 µs for each

Increment = tuple[int, RequestOutput]  # the prompt's index, and what is new of it


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
        return fingerprint(self.llm.config)

    def hear(self, output: RequestOutput) -> None:
        """An increment, or a whole output, which is to be told to the client."""
        if self.continuation is not None:
            self.continuation.hear(output)

    def kept_state(self) -> KVCacheState | msgspec.UnsetType | None:
        """A reply's kv_cache_state, when all of it was heard."""
        return msgspec.UNSET if self.continuation is None else self.continuation.keep()

    async def whole(self) -> list[RequestOutput]:
        return await self.llm.agenerate(self.prompts, self.params, **self.terms)

    async def increments(self) -> AsyncGenerator[Increment, None]:
        """Increments of all prompts as they come. Closing the generator aborts what still runs."""
        if len(self.prompts) == 1:
            async with aclosing(self._increments_of(0)) as stream:
                async for increment in stream:
                    yield increment
            return
        arrived: asyncio.Queue[Increment | Exception | None] = asyncio.Queue()
        pumps = [asyncio.ensure_future(self._pump(index, arrived)) for index in range(len(self.prompts))]
        try:
            running = len(pumps)
            while running:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)

    async def _pump(self, index: int, arrived: "asyncio.Queue[Increment | Exception | None]") -> None:
        try:
            async with aclosing(self._increments_of(index)) as stream:
                async for increment in stream:
                    arrived.put_nowait(increment)
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    async def _increments_of(self, index: int) -> AsyncGenerator[Increment, None]:
        async with aclosing(self.llm.generate(self.prompts[index], self.params, **self.terms)) as stream:
            async for output in stream:
                yield index, output


@dataclass
class Tally:
    """Counts a stream's tokens."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    _prompts: set[str] = field(default_factory=set)

    def add(self, output: RequestOutput) -> None:
        """An increment, or a whole output."""
        if output.request_id not in self._prompts:
            self._prompts.add(output.request_id)
            self.prompt_tokens += len(output.prompt_token_ids)
            self.cached_tokens += output.metrics.cached_tokens
        self.completion_tokens += sum(len(completion.token_ids) for completion in output.outputs)

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


async def tokenised(
    tokenizer: Tokenizer, prompts: list[str | list[int]], add_special_tokens: bool = True
) -> list[list[int]]:
    """Prompts as token ids. Long text is left to a thread, with the GIL released: others are served meanwhile."""

    def encode() -> list[list[int]]:
        return [tokenizer.encode(p, add_special_tokens) if isinstance(p, str) else p for p in prompts]

    is_long = sum(len(prompt) for prompt in prompts if isinstance(prompt, str)) > LONG_TEXT
    return await asyncio.to_thread(encode) if is_long else encode()


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


@functools.cache
def fingerprint(config: EngineConfig) -> str:
    """Names what decides the tokens beside the request: under the same one, the same seed brings the same text."""
    what = (__version__, config.model, config.revision, config.backend, config.dtype)
    return f"fp_{blake2b(repr(what).encode(), digest_size=6).hexdigest()}"
