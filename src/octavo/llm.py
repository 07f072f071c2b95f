"""LLM: generate text from Python, with the engine in this process."""

import asyncio
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Unpack, cast

from .config import EngineConfig
from .engine.messages import EngineStats
from .errors import ConfigError, InvalidRequest
from .frontend.chat import Conversation, conversations
from .frontend.frontend import Frontend
from .frontend.links.thread import ThreadLink
from .frontend.live import LiveRequest, Sink
from .frontend.loop_thread import LoopThread
from .frontend.progress import generation_bar
from .frontend.prompt_stream import PromptStream
from .frontend.requests import Prompt, Request, check_grammars, make_request, make_requests, tokenize, tokenize_all
from .outputs import RequestOutput
from .params import SamplingParams, Terms
from .states import KVState
from .text import Tokenizer
from .weights import generation_defaults, resolve

CLOSE_PATIENCE = 15.0  # seconds to wait for the engine to finish its step and write its pages


class LLM:
    """A loaded model that generates text. The keywords of the constructor are the fields of EngineConfig.

        llm = LLM("smollm2", max_model_len=4096)
        print(llm.generate("Once upon a time", SamplingParams(max_tokens=64))[0].text)

    Any number of threads and asyncio tasks may call the methods at the same time. Their requests share batches, which
    does not change their tokens. `AsyncLLM` has the same methods.

    The methods raise subclasses of OctavoError; see errors.py.
    """

    def __init__(self, model: str = "smollm2", **settings: Any):
        self._set_up(EngineConfig.from_keywords(model=model, **settings))

    @classmethod
    def from_config(cls, config: EngineConfig) -> "LLM":
        """Return an LLM with exactly these settings. OCTAVO_* variables are ignored."""
        llm = cls.__new__(cls)
        llm._set_up(config)
        return llm

    def _set_up(self, config: EngineConfig) -> None:
        if config.data_parallel_size > 1:
            raise ConfigError("data_parallel_size must be 1 with LLM, whose engine is in this process; use AsyncLLM")
        self.config = config
        path: Path = resolve(config.model, config.revision)
        self.tokenizer = Tokenizer.load(path, **config.template_limits)
        self.generation_defaults = generation_defaults(path) if config.generation_config == "auto" else {}
        self.default_sampling_params = SamplingParams(**self.generation_defaults)  # type: ignore[arg-type]
        self._thread = LoopThread()
        owner = _StateOwner(self._thread)
        self._frontend = owner.frontend = Frontend(
            config, self.tokenizer, lambda _: ThreadLink(config, path), has_queue_limit=False, state_owner=owner
        )
        self._finalizer = weakref.finalize(self, _shut_down, self._thread, self._frontend)
        try:
            self.info = self._thread.run(self._frontend.start([ThreadLink(config, path)]))
        except BaseException:
            self.shutdown()
            raise

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
        """Complete prompts. Return one RequestOutput for each prompt, in order.

        Args:
            prompts: one prompt or several, each as text, as token ids, or as a PromptDict.
            sampling_params: one for all prompts, or one each; `default_sampling_params` by default.
            use_tqdm: whether to show a progress bar on a terminal.
            kv_cache_state: the state that the prompts continue, one for all or one each. Its tokens are not computed
                again.
            priority: one for all prompts, or one each.
            terms: tenant, ttft_target, timeout and cache_salt; see ServiceTerms.

        Raises InvalidRequest, PromptTooLong, InvalidKVState, RequestTimeout, RequestFailed, EngineDead.
        """
        requests = make_requests(
            prompts, sampling_params, self.default_sampling_params, priority, terms, kv_cache_state
        )
        done: SimpleQueue[LiveRequest | Exception] = SimpleQueue()

        def sink(live: LiveRequest, output: RequestOutput | Exception) -> None:
            if isinstance(output, Exception):
                done.put(output)
            elif output.finished:
                done.put(live)

        lives = self._submit(requests, sink)
        try:
            with generation_bar(len(lives), enabled=use_tqdm) as advance:
                for _ in lives:
                    live = done.get()
                    if isinstance(live, Exception):
                        raise live
                    advance(live.num_tokens)
        except BaseException:
            self._thread.post(self._frontend.abort, lives)
            raise
        return [live.whole() for live in lives]

    def generate_iter(
        self,
        prompts: Iterable[Prompt | Conversation],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **terms: Unpack[Terms],
    ) -> Generator[RequestOutput, None, None]:
        """Complete prompts from an iterable of any length, such as a generator. Yield one output each, in order.

            for output in llm.generate_iter(map(str.strip, open("reviews.txt")), params):
                print(output.text)

        Memory does not grow with the number of prompts: a few times `max_batch_size` of them are read ahead, in the
        caller's thread, and no more until outputs are taken. Closing the generator aborts what runs. A prompt that is
        refused, or whose request fails, has an output with `error`; the others go on. An exception of `prompts` is
        raised after the outputs of the prompts before it.

        Args:
            prompts: each as text, as token ids, as a PromptDict, or as a conversation for the model's chat template.
            sampling_params: for all prompts; `default_sampling_params` by default.
            priority, terms: for all prompts; see `generate`.

        Raises InvalidRequest for wrong parameters, before any prompt is read; EngineDead.
        """
        if isinstance(prompts, (str, dict)):
            raise InvalidRequest("prompts must be an iterable of prompts, not a single one", "prompts")
        params = sampling_params or self.default_sampling_params

        def prepare(prompt: Prompt | Conversation) -> tuple[Request, list[int]]:
            if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
                prompt = self.chat_tokens(prompt)
            request = make_request(cast("Prompt", prompt), params, priority, terms)
            return request, tokenize(request, self.tokenizer, self.info)

        checked, _ = prepare([0])
        check_grammars([checked], self.tokenizer)
        return PromptStream(self._thread, self._frontend, prompts, prepare, self.config.max_batch_size).outputs()

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several. The other arguments are those of `generate`.

        Args:
            messages: a list of {"role": ..., "content": ...}, or a list of such lists.
        """
        prompts: list[Prompt] = [self.chat_tokens(one) for one in conversations(messages)]
        return self.generate(prompts, sampling_params, use_tqdm, priority=priority, **terms)

    def chat_tokens(self, messages: Conversation) -> list[int]:
        """Render a conversation with the model's chat template, and return the prompt's token ids."""
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
        """Do what `generate` does, without blocking the event loop. Prompts of other tasks join the batch."""
        requests = make_requests(
            prompts, sampling_params, self.default_sampling_params, priority, terms, kv_cache_state
        )
        loop = asyncio.get_running_loop()
        done: asyncio.Queue[LiveRequest | Exception] = asyncio.Queue()

        def sink(live: LiveRequest, output: RequestOutput | Exception) -> None:
            if isinstance(output, Exception):
                loop.call_soon_threadsafe(done.put_nowait, output)
            elif output.finished:
                loop.call_soon_threadsafe(done.put_nowait, live)

        tokens = await tokenize_all(requests, self.tokenizer, self.info)
        lives = self._thread.call(self._frontend.submit, requests, tokens, sink)
        try:
            for _ in lives:
                live = await done.get()
                if isinstance(live, Exception):
                    raise live
        except BaseException:
            self._thread.post(self._frontend.abort, lives)
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
        """Yield the increments of one request as they are computed. Their `outputs` hold only the new parts.

        Closing the iterator aborts the request. The arguments are those of `generate`.
        """
        params = sampling_params or self.default_sampling_params
        request = make_request(prompt, params, priority, terms, kv_cache_state)
        increments: SimpleQueue[RequestOutput | Exception] = SimpleQueue()
        lives = self._submit([request], lambda _, output: increments.put(output))
        try:
            while True:
                increment = increments.get()
                if isinstance(increment, Exception):
                    raise increment
                yield increment
                if increment.finished:
                    return
        finally:
            self._thread.post(self._frontend.abort, lives)

    def get_kv_cache_state(self, request_id: str, index: int = 0) -> KVState:
        """Return a handle on the tokens of a finished request, prompt and output, from which requests can continue.

        Args:
            index: the completion's index among the request's `n`.

        The state is kept until kv_state_ttl seconds after its last use. Raises InvalidRequest if the request is
        unknown, still runs, or ended too long ago; QuotaExceeded; EngineDead.
        """
        return self._thread.call(self._frontend.keep_state, request_id, index)

    def load_kv_cache_state(self, path: str | Path, *, tenant: str = "", cache_salt: str | None = None) -> KVState:
        """Load a state from a file that `KVState.save` wrote, on the same type of machine with the same model.

        Load only files that you trust: their author decides which text the model believes to have processed.
        Raises InvalidKVState if the file is damaged or belongs to another model, recipe, machine type or tenant;
        QuotaExceeded; EngineDead.
        """
        return self._thread.run(self._frontend.load_state(Path(path).absolute(), tenant, cache_salt or ""))

    def stats(self) -> EngineStats:
        """Return the engine's statistics, measured between two steps. Raises EngineDead."""
        return self._thread.run(self._frontend.engine_stats())

    def shutdown(self) -> None:
        """Free threads and memory now instead of at garbage collection. Live requests fail with EngineDead."""
        if self._finalizer.detach():
            _shut_down(self._thread, self._frontend, wait=True)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _submit(self, requests: list[Request], sink: Sink) -> list[LiveRequest]:
        tokens = [tokenize(request, self.tokenizer, self.info) for request in requests]
        check_grammars(requests, self.tokenizer)
        return self._thread.call(self._frontend.submit, requests, tokens, sink)


class _StateOwner:
    """The StateOwner of an LLM's KV states, for any thread."""

    frontend: Frontend

    def __init__(self, thread: LoopThread):
        self._thread = thread

    def drop_state(self, state: KVState) -> None:
        self._thread.post(self.frontend.drop_state, state)  # nothing to do if the engine is gone

    def save_state(self, state: KVState, path: Path) -> None:
        self._thread.run(self.frontend.save_state(state, path))


def _shut_down(thread: LoopThread, frontend: Frontend, wait: bool = False) -> None:
    """End the engine. The garbage collector may call this in any thread, so only the main thread waits for the end."""

    async def close() -> None:
        await frontend.close()
        thread.close()

    tasks = []  # keeps a reference to the task
    thread.post(lambda: tasks.append(asyncio.ensure_future(close())))
    if wait or threading.current_thread() is threading.main_thread():
        thread.join(CLOSE_PATIENCE)
