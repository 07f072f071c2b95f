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
from .errors import ConfigError, EngineDead, InvalidRequest
from .formats.files import unlock
from .frontend.beam_search import BeamSearch, beam_search_output
from .frontend.chat import ChatOptions, Conversation, chat_tokens, conversations
from .frontend.frontend import Frontend
from .frontend.links.thread import ThreadLink
from .frontend.live import LiveRequest, Sink
from .frontend.loop_thread import LoopThread
from .frontend.metrics import Metric, metrics_of
from .frontend.pooled import check_task, embedding_output, embedding_requests, pooling_output
from .frontend.progress import generation_bar
from .frontend.prompt_stream import PromptStream
from .frontend.requests import (
    Prompt,
    Request,
    check_grammars,
    check_logprobs,
    check_sleep,
    check_streamable,
    make_request,
    make_requests,
    tokenize,
    tokenize_all,
)
from .frontend.scoring import ScoringParams, pairs_of, score_requests, scoring_output, share_prefix
from .outputs import (
    BeamSearchOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from .params import BeamSearchParams, PoolingParams, SamplingParams, Terms
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
        if config.engines is not None:
            raise ConfigError("engines must be unset with LLM, whose engine is in this process; use AsyncLLM")
        self.config = config
        self._is_sleeping = False
        secrets = self._secrets = config.read_secrets()
        path = self._path = resolve(config.model, config.revision)
        files = unlock(path, secrets.model_identity)
        self.tokenizer = Tokenizer.load(files, **config.template_limits)
        self.generation_defaults = generation_defaults(files) if config.generation_config == "auto" else {}
        self.default_sampling_params = SamplingParams(**self.generation_defaults)  # type: ignore[arg-type]
        self._thread = LoopThread()
        owner = _StateOwner(self._thread)
        try:
            self._frontend = owner.frontend = Frontend(
                config,
                self.tokenizer,
                lambda _: ThreadLink(config, path, secrets),
                has_queue_limit=False,
                state_owner=owner,
                kv_key=secrets.kv_key,
            )
        except BaseException:
            self._thread.close()
            raise
        self._finalizer = weakref.finalize(self, _shut_down, self._thread, self._frontend)
        try:
            self.info = self._thread.run(self._frontend.start([ThreadLink(config, path, secrets)]))
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
            prompts: one prompt or several, each as text, as token ids, or as a TextPrompt or TokensPrompt.
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
        return self._complete(requests, use_tqdm)

    def _complete(
        self, requests: list[Request], use_tqdm: bool, tokens: list[list[int]] | None = None
    ) -> list[RequestOutput]:
        done: SimpleQueue[LiveRequest | Exception] = SimpleQueue()

        def sink(live: LiveRequest, output: RequestOutput | Exception) -> None:
            if isinstance(output, Exception):
                done.put(output)
            elif output.finished:
                done.put(live)

        lives = self._submit(requests, sink, tokens)
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
            prompts: each as text, as token ids, as a TextPrompt or TokensPrompt, or as a conversation for the model's
                chat template.
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
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several. The other arguments are those of ChatOptions and `generate`.

        Args:
            messages: a list of {"role": ..., "content": ...}, or a list of such lists.

        The text of an answer has tool calls and reasoning as the model writes them.
        """
        options = ChatOptions(
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        prompts: list[Prompt] = [self.chat_tokens(one, **options) for one in conversations(messages)]
        return self.generate(prompts, sampling_params, use_tqdm, priority=priority, **terms)

    def chat_tokens(self, messages: Conversation, **options: Unpack[ChatOptions]) -> list[int]:
        """Render a conversation with the chat template, and return the prompt's token ids."""
        return chat_tokens(self.tokenizer, messages, options)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = False,
        *,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> list[BeamSearchOutput]:
        """Search the likeliest outputs of prompts. Return one BeamSearchOutput for each prompt, in order.

        The arguments besides `params` are those of `generate`.
        """
        requests = make_requests(prompts, None, SamplingParams(temperature=0), priority, terms)
        tokens = self._tokens(requests)
        search = BeamSearch(requests, tokens, params, self.tokenizer, self.info, self.config)
        with generation_bar(len(requests), enabled=use_tqdm) as advance:
            while tokens := search.tokens:
                search.advance(self._complete(search.requests(), use_tqdm=False, tokens=tokens))
            for output in search.outputs():
                advance(sum(len(completion.token_ids) for completion in output.outputs))
        return [beam_search_output(output, self.tokenizer) for output in search.outputs()]

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

        self._check(requests)
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

        With another `output_kind` of the sampling parameters, they hold the whole output so far, or there is a single
        output at the end. Closing the iterator aborts the request. The arguments are those of `generate`.
        """
        params = sampling_params or self.default_sampling_params
        request = make_request(prompt, params, priority, terms, kv_cache_state)
        check_streamable([request])
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

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: bool = True,
        *,
        pooling_params: PoolingParams | None = None,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> list[EmbeddingRequestOutput]:
        """Return the embedding of each prompt, in order: `.outputs.embedding`, a list of floats.

        The arguments are those of `generate`. Raises the same exceptions.
        """
        params = pooling_params or PoolingParams()
        requests = embedding_requests(prompts, params, self.info, priority, terms)
        return [embedding_output(output, params) for output in self._complete(requests, use_tqdm)]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        *,
        pooling_task: str | None = None,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Return what `embed` returns, but as arrays: `.outputs.data`, float32.

        Args:
            pooling_task: vLLM's name of the task; only "embed".
        """
        check_task(pooling_task)
        params = pooling_params or PoolingParams()
        requests = embedding_requests(prompts, params, self.info, priority, terms)
        return [pooling_output(output, params) for output in self._complete(requests, use_tqdm)]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        use_tqdm: bool = True,
        *,
        scoring_params: ScoringParams | None = None,
        priority: int = 0,
        **terms: Unpack[Terms],
    ) -> list[ScoringRequestOutput]:
        """Return the probability that each document is relevant for its query: `.outputs.score`, from 0 to 1.

        Args:
            data_1: a query for all documents, or one for each.
            data_2: the documents.
            scoring_params: the prompt, and the answers whose probabilities are compared; by default, Qwen3-Reranker's.
        """
        pairs = pairs_of(data_1, data_2)
        requests = score_requests(pairs, scoring_params or ScoringParams(), self.tokenizer, self.info, priority, terms)
        first = self._complete(requests[:1], use_tqdm=False) if share_prefix(pairs) else []  # the others find its pages
        rest = self._complete(requests[len(first) :], use_tqdm)
        return [scoring_output(output) for output in first + rest]

    def get_kv_cache_state(self, request_id: str, index: int = 0) -> KVState:
        """Return a handle on the tokens of a finished request, prompt and output, from which requests can continue.

        Args:
            index: the completion's index among the request's `n`.

        The state is kept until kv_state_ttl seconds after its last use. Raises InvalidRequest if the request is
        unknown, still runs, or ended too long ago; QuotaExceeded; EngineDead.
        """
        return self._thread.call(self._frontend.kv_states.keep, request_id, index)

    def load_kv_cache_state(self, path: str | Path, *, tenant: str = "", cache_salt: str | None = None) -> KVState:
        """Load a state from a file that `KVState.save` wrote, on the same type of machine with the same model.

        Load only files that you trust: their author decides which text the model believes to have processed.
        Raises InvalidKVState if the file is damaged or belongs to another model, recipe, machine type or tenant;
        QuotaExceeded; EngineDead.
        """
        return self._thread.run(self._frontend.kv_states.load(Path(path).absolute(), tenant, cache_salt or ""))

    def stats(self) -> EngineStats:
        """Return the engine's statistics, measured between two steps. Raises EngineDead."""
        return self._thread.run(self._frontend.engine_stats())

    def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer."""
        return self.tokenizer

    def get_metrics(self) -> list[Metric]:
        """Return the engine's statistics as counters and gauges with vLLM's names."""
        return metrics_of(self._thread.run(self._frontend.replica_stats()), self.config.model_name)

    def reset_prefix_cache(self) -> bool:
        """Evict all cached KV pages from memory. Return False, and evict none, while requests run. Raises EngineDead.

        Pages in kv_disk and kv_host_memory stay. KV states stay too, and are computed again when they are used.
        """
        return self._thread.run(self._frontend.reset_prefix_cache())

    def sleep(self, level: int = 1) -> None:
        """Free the memory of the model's weights and KV cache until `wake_up`, which loads them again.

        Running requests go on after `wake_up`, to the same tokens; new ones are refused until then. KV states are kept,
        and pages in kv_disk.

        Args:
            level: 1 or 2, as in vLLM. Both free everything.
        """
        check_sleep(level)
        self._is_sleeping = True
        self._thread.run(self._frontend.stop())

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Load the model again after `sleep`. Raises any error from loading; then the model still sleeps.

        Args:
            tags: None, or both "weights" and "kv_cache", which wake up together.
        """
        check_sleep(tags=tags)
        if self._is_sleeping:
            self._thread.run(self._frontend.start([ThreadLink(self.config, self._path, self._secrets)]))
            self._is_sleeping = False

    def is_sleeping(self) -> bool:
        """Return whether the model sleeps."""
        return self._is_sleeping

    def shutdown(self) -> None:
        """Free threads and memory now instead of at garbage collection. Live requests fail with EngineDead."""
        if self._finalizer.detach():
            _shut_down(self._thread, self._frontend, wait=True)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _submit(self, requests: list[Request], sink: Sink, tokens: list[list[int]] | None = None) -> list[LiveRequest]:
        """Start requests. Check and tokenize them first, unless the token ids of their prompts are given."""
        tokens = self._tokens(requests) if tokens is None else tokens
        return self._thread.call(self._frontend.submit, requests, tokens, sink)

    def _tokens(self, requests: list[Request]) -> list[list[int]]:
        """Check requests, and return the token ids of their prompts."""
        self._check(requests)
        tokens = [tokenize(request, self.tokenizer, self.info) for request in requests]
        check_grammars(requests, self.tokenizer)
        return tokens

    def _check(self, requests: list[Request]) -> None:
        if self._is_sleeping:
            raise EngineDead("the model sleeps: call wake_up first")
        for request in requests:
            check_logprobs(request.params, self.config.max_logprobs, self.info)


class _StateOwner:
    """The StateOwner of an LLM's KV states, for any thread."""

    frontend: Frontend

    def __init__(self, thread: LoopThread):
        self._thread = thread

    def drop_state(self, state: KVState) -> None:
        self._thread.post(self.frontend.kv_states.drop_state, state)  # nothing to do if the engine is gone

    def save_state(self, state: KVState, path: Path) -> None:
        self._thread.run(self.frontend.kv_states.save_state(state, path))


def _shut_down(thread: LoopThread, frontend: Frontend, wait: bool = False) -> None:
    """End the engine. The garbage collector may call this in any thread, so only the main thread waits for the end."""

    async def close() -> None:
        await frontend.close()
        thread.close()

    tasks = []  # keeps a reference to the task
    thread.post(lambda: tasks.append(asyncio.ensure_future(close())))
    if wait or threading.current_thread() is threading.main_thread():
        thread.join(CLOSE_PATIENCE)
