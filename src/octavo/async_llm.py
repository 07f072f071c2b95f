"""AsyncLLM: generate text from asyncio, with the engine in a process of its own."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Unpack

from .config import EngineConfig
from .engine.messages import EngineInfo, EngineStats
from .frontend.admission import FrontendStats
from .frontend.inbox import Inbox
from .frontend.live import LiveRequest
from .frontend.prompts import Ask, Prompt, ask, asks
from .frontend.remote_engine import RemoteEngine
from .outputs import RequestOutput
from .params import SamplingParams, Terms
from .states import KVState, StateBook
from .text import Tokenizer
from .weights import resolve

Increment = tuple[int, RequestOutput]  # the prompt's index, and what is new of it


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
        asked = ask(prompt, params, priority, terms, kv_cache_state)
        async with aclosing(self._stream([asked], request_id)) as stream:
            async for increments in stream:
                for _, increment in increments:
                    yield increment

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv_cache_state: KVState | Sequence[KVState] | None = None,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> AsyncGenerator[list[Increment], None]:
        """`generate` for several prompts: each time, the increments that have come since the last time.

        params, priority: for all prompts, or one each.
        """
        return self._stream(asks(prompts, params, priority, terms, kv_cache_state))

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv_cache_state: KVState | Sequence[KVState] | None = None,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> list[RequestOutput]:
        """Complete prompts, given as text, as token ids, or as a PromptDict: one whole RequestOutput each, in order.

        params, priority: for all prompts, or one each. terms and what is raised: see `generate`; all or none are taken.
        """
        done: Inbox[LiveRequest] = Inbox()

        def sink(live: LiveRequest, output: RequestOutput | Exception) -> None:
            if isinstance(output, Exception):
                done.fail(output)
            elif output.finished:
                done.put(live)

        lives = self._engine.submit(asks(prompts, params, priority, terms, kv_cache_state), sink)
        try:
            running = len(lives)
            while running:
                running -= len(await done.take())
        except BaseException:
            self._engine.abort([live.id for live in lives])
            raise
        return [live.whole() for live in lives]

    def check_capacity(self, completions: int) -> None:
        """Raises what `generate` would for so many completions, whatever their prompts: QueueFull, InvalidRequest."""
        self._engine.check_capacity(completions)

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
    def kv_cache_states(self) -> StateBook:
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

    async def _stream(self, asked: list[Ask], request_id: str | None = None) -> AsyncGenerator[list[Increment], None]:
        inbox: Inbox[RequestOutput] = Inbox()

        def sink(_: LiveRequest, increment: RequestOutput | Exception) -> None:
            if isinstance(increment, Exception):
                inbox.fail(increment)
            else:
                inbox.put(increment)

        lives = self._engine.submit(asked, sink, request_id)
        index = {live.id: i for i, live in enumerate(lives)}
        try:
            running = len(lives)
            while running:
                increments = await inbox.take()
                running -= sum(increment.finished for increment in increments)
                yield [(index[increment.request_id], increment) for increment in increments]
        finally:
            self._engine.abort(index)

    async def __aenter__(self) -> "AsyncLLM":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
