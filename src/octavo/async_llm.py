"""AsyncLLM: generate text from asyncio, with the engine in a process of its own."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, Unpack

from .config import EngineConfig
from .engine.messages import EngineInfo, EngineStats
from .frontend.admission import FrontendStats
from .frontend.kv_states import KVState, KVStates
from .frontend.live import LiveRequest
from .frontend.prompts import Ask, Prompt, asks
from .frontend.remote_engine import RemoteEngine
from .outputs import RequestOutput
from .params import SamplingParams, ServiceTerms, Terms
from .text import Tokenizer
from .weights import resolve


class AsyncLLM:
    """A model served by an engine process that loads from the constructor on. Keywords are the fields of EngineConfig.

        async with AsyncLLM("smollm2") as llm:
            async for increment in llm.generate("Once upon", SamplingParams(max_tokens=64)):
                print(increment.text, end="")

    For one event loop. If the engine crashes, every request goes on where it was.
    """

    info: EngineInfo  # from `start` on

    def __init__(self, model: str = "smollm2", **settings: Any):
        self._set_up(EngineConfig.from_keywords(model=model, **settings))

    @classmethod
    def from_config(cls, config: EngineConfig) -> "AsyncLLM":
        llm = cls.__new__(cls)
        llm._set_up(config)
        return llm

    def _set_up(self, config: EngineConfig) -> None:
        self.config = config
        path = resolve(config.model, config.revision)
        self._engine = RemoteEngine(config, path)
        try:
            self.tokenizer = Tokenizer.load(path)
        except BaseException:
            self._engine.end_process()
            raise

    async def start(self) -> None:
        """Wait until the engine is ready. Raises what loading raised."""
        self.info = await self._engine.start(self.tokenizer)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        kv_cache_state: KVState | None = None,
        priority: int = 0,
        **terms: Unpack[Terms],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Increments as they come: of each, `outputs` has what is new. To stop iterating is to abort the request.

        kv_cache_state: what the prompt goes on from.
        priority, terms (tenant, ttft_target, timeout, cache_salt): as of ServiceTerms.
        Raises QueueFull, InvalidRequest or PromptTooLong before the first one, RequestTimeout, RequestFailed or
        EngineDead at any time.
        """
        ask = Ask(prompt, params or SamplingParams(), ServiceTerms(priority=priority, **terms), kv_cache_state)
        increments: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        [live] = self._engine.submit([ask], lambda _, increment: increments.put_nowait(increment), request_id)
        try:
            while True:
                increment = await increments.get()
                if isinstance(increment, Exception):
                    raise increment
                yield increment
                if increment.finished:
                    return
        finally:
            self._engine.abort([live.id])

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv_cache_state: KVState | Sequence[KVState] | None = None,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> list[RequestOutput]:
        """Complete prompts, given as text or as token ids: one whole RequestOutput each, in order.

        params, priority: for all prompts, or one each. terms and what is raised: see `generate`; all or none are taken.
        """
        done: asyncio.Queue[Exception | None] = asyncio.Queue()

        def sink(live: LiveRequest, output: RequestOutput | Exception) -> None:
            if isinstance(output, Exception):
                done.put_nowait(output)
            elif output.finished:
                done.put_nowait(None)

        lives = self._engine.submit(asks(prompts, params, priority, terms, kv_cache_state), sink)
        try:
            for _ in lives:
                if (error := await done.get()) is not None:
                    raise error
        except BaseException:
            self._engine.abort([live.id for live in lives])
            raise
        return [live.whole() for live in lives]

    def check_room(self, completions: int) -> None:
        """Raises what `generate` would for so many completions, whatever their prompts: QueueFull, InvalidRequest."""
        self._engine.check_room(completions)

    async def abort(self, request_id: str) -> None:
        """End a request: its iterator gets a last increment with finish_reason "abort"."""
        self._engine.abort([request_id], say_so=True)

    async def get_kv_cache_state(self, request_id: str, index: int = 0) -> KVState:
        """See LLM.get_kv_cache_state. Of these states, `save` is a coroutine."""
        return self._engine.keep_state(request_id, index)

    async def load_kv_cache_state(
        self, path: str | Path, *, tenant: str = "", cache_salt: str | None = None
    ) -> KVState:
        """See LLM.load_kv_cache_state."""
        return await self._engine.load_state(Path(path).absolute(), tenant, cache_salt or "")

    @property
    def kv_cache_states(self) -> KVStates:
        """All that are held, to be found by their handles. From `start` on."""
        return self._engine.states

    async def stats(self) -> EngineStats:
        return await self._engine.stats()

    def frontend_stats(self) -> FrontendStats:
        """Raises EngineDead."""
        return self._engine.frontend_stats()

    @property
    def is_alive(self) -> bool:
        return not self._engine.dead.is_set()

    async def wait_dead(self) -> None:
        """Returns when the engine is dead and could not be brought back."""
        await self._engine.dead.wait()

    async def close(self) -> None:
        """End the engine process. Live requests get EngineDead."""
        await self._engine.close()

    async def __aenter__(self) -> "AsyncLLM":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
