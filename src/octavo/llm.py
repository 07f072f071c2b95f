"""LLM: generate text from Python, with the engine in this process."""

import asyncio
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Unpack, cast

from .config import EngineConfig
from .engine.loading import load_engine
from .engine.messages import EngineStats
from .frontend.live import LiveRequest
from .frontend.local_engine import LocalEngine
from .frontend.progress import generation_bar, loading_bar
from .frontend.prompts import Prompt, ask, asks
from .outputs import RequestOutput
from .params import SamplingParams, Terms
from .states import KVState
from .text import Tokenizer
from .weights import resolve

Message = dict[str, Any]


class LLM:
    """A model, ready to generate. Keywords are the fields of EngineConfig.

    Any number of threads and asyncio tasks may call it at the same time; their requests share batches. Same request,
    same tokens: whatever else runs. Raises OctavoError subclasses from errors.py.
    """

    def __init__(self, model: str = "smollm2", **settings: Any):
        self._set_up(EngineConfig.from_keywords(model=model, **settings))

    @classmethod
    def from_config(cls, config: EngineConfig) -> "LLM":
        """Return an LLM with these settings, whatever the environment says."""
        llm = cls.__new__(cls)
        llm._set_up(config)
        return llm

    def _set_up(self, config: EngineConfig) -> None:
        self.config = config
        path: Path = resolve(self.config.model, self.config.revision)
        self.tokenizer = Tokenizer.load(path)
        with loading_bar() as progress:
            engine = load_engine(self.config, path, progress)
        self._engine = LocalEngine(engine, self.tokenizer, self.config)
        self._finalizer = weakref.finalize(self, self._engine.close)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        kv_cache_state: KVState | Sequence[KVState] | None = None,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> list[RequestOutput]:
        """Complete prompts, given as text, as token ids, or as a PromptDict: one RequestOutput each, in order.

        sampling_params: for all prompts, or one each; default SamplingParams(). use_tqdm: a progress bar on a terminal.
        kv_cache_state: what the prompts go on from, one for all or one each; of it, nothing is computed again.
        priority: for all prompts, or one each. terms: tenant, ttft_target, timeout, cache_salt, as of ServiceTerms.
        """
        requests = asks(prompts, sampling_params, priority, terms, kv_cache_state)
        done: SimpleQueue[LiveRequest | Exception] = SimpleQueue()

        def sink(live: LiveRequest, output: RequestOutput | Exception) -> None:
            if isinstance(output, Exception):
                done.put(output)
            elif output.finished:
                done.put(live)

        lives = self._engine.submit(requests, sink)
        try:
            with generation_bar(len(lives), enabled=use_tqdm) as advance:
                for _ in lives:
                    live = done.get()
                    if isinstance(live, Exception):
                        raise live
                    advance(live.num_tokens)
        except BaseException:
            self._engine.abort([live.id for live in lives])
            raise
        return [live.whole() for live in lives]

    def chat(
        self,
        messages: list[Message] | Sequence[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several: lists of {"role": ..., "content": ...}."""
        several = bool(messages) and isinstance(messages[0], list)
        conversations = cast("list[list[Message]]", messages if several else [messages])
        prompts = [self.chat_tokens(one) for one in conversations]
        return self.generate(prompts, sampling_params, use_tqdm, priority=priority, **terms)

    def chat_tokens(self, messages: list[Message]) -> list[int]:
        """The prompt that a conversation becomes."""
        return self.tokenizer.encode(self.tokenizer.chat(messages), add_special_tokens=False)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv_cache_state: KVState | Sequence[KVState] | None = None,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> list[RequestOutput]:
        """`generate` for asyncio: other tasks run meanwhile, and their prompts join the batch."""
        requests = asks(prompts, sampling_params, priority, terms, kv_cache_state)
        loop = asyncio.get_running_loop()
        done: asyncio.Queue[LiveRequest | Exception] = asyncio.Queue()

        def sink(live: LiveRequest, output: RequestOutput | Exception) -> None:
            if isinstance(output, Exception):
                loop.call_soon_threadsafe(done.put_nowait, output)
            elif output.finished:
                loop.call_soon_threadsafe(done.put_nowait, live)

        lives = self._engine.submit(requests, sink)
        try:
            for _ in lives:
                live = await done.get()
                if isinstance(live, Exception):
                    raise live
        except BaseException:
            self._engine.abort([live.id for live in lives])
            raise
        return [live.whole() for live in lives]

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        kv_cache_state: KVState | None = None,
        priority: int = 0,
        **terms: Unpack[Terms],
    ) -> Iterator[RequestOutput]:
        """Increments of one request as they come; to stop iterating is to abort it."""
        asked = ask(prompt, sampling_params, priority, terms, kv_cache_state)
        increments: SimpleQueue[RequestOutput | Exception] = SimpleQueue()
        lives = self._engine.submit([asked], lambda _, new: increments.put(new))
        try:
            while True:
                increment = increments.get()
                if isinstance(increment, Exception):
                    raise increment
                yield increment
                if increment.finished:
                    return
        finally:
            self._engine.abort([live.id for live in lives])

    def get_kv_cache_state(self, request_id: str, index: int = 0) -> KVState:
        """A handle on all the tokens of a request that has finished, its output included, to continue from.

        index: of its `n` completions, which. What it has is kept for kv_state_ttl seconds since its last use.
        Raises InvalidRequest for a request that is unknown, still runs, or was too long ago, QuotaExceeded.
        """
        return self._engine.keep_state(request_id, index)

    def load_kv_cache_state(self, path: str | Path, *, tenant: str = "", cache_salt: str | None = None) -> KVState:
        """A state that `KVState.save` wrote, here or elsewhere, on the same kind of machine with the same model.

        Load only what you trust: whoever wrote the file decides what the model will take its text to have been.
        Raises InvalidKVState if it is damaged, or of another model, recipe or tenant; QuotaExceeded.
        """
        return self._engine.load_state(Path(path).absolute(), tenant, cache_salt or "")

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def shutdown(self) -> None:
        """Free threads and memory now, not when the object is collected. Live requests get EngineDead."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
