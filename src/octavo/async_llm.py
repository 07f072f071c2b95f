"""AsyncLLM: generate text from asyncio, with one or more engines in processes of their own."""

import asyncio
import dataclasses
import importlib.util
import secrets
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from .config import EngineConfig
from .engine.messages import EngineInfo, EngineStats
from .errors import ConfigError, EngineDead, OctavoError
from .formats.files import ModelPath, unlock
from .frontend.beam_search import BeamSearch, beam_search_output
from .frontend.chat import ChatOptions, Conversation, chat_tokens, conversations
from .frontend.frontend import Frontend
from .frontend.inbox import Inbox
from .frontend.links.process import LOCAL, EngineProcess, ProcessLink
from .frontend.live import LiveRequest, Sink
from .frontend.meter import Meter
from .frontend.metrics import Metric, metrics_of
from .frontend.pooled import check_task, embedding_output, embedding_requests, pooling_output
from .frontend.requests import (
    Prompt,
    Request,
    check_logprobs,
    check_sleep,
    check_streamable,
    make_request,
    make_requests,
    max_output,
    tokenize_all,
)
from .frontend.router import Load
from .frontend.scoring import ScoringParams, pairs_of, score_requests, scoring_output, share_prefix
from .frontend.stats import FrontendStats, ReplicaStats
from .frontend.tally import Tally
from .kv.peers.access import PeerAccess
from .outputs import (
    BeamSearchOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from .params import BeamSearchParams, PoolingParams, SamplingParams, Terms
from .states import KVState, StateBook
from .text import Tokenizer
from .weights import generation_defaults, resolve

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from .network.discovery import FoundModel
    from .network.followed import FollowedEngines

STATS_PATIENCE = 1.0  # seconds to wait for the engine's statistics

Increment = tuple[int, RequestOutput]
"""The index of a prompt, and an increment of its output."""


class AsyncLLM:
    """A model in an engine process, or in several (data_parallel_size), which the constructor starts.

    The keywords are the fields of EngineConfig.

        async with AsyncLLM("smollm2") as llm:
            async for increment in llm.stream("Once upon a time", SamplingParams(max_tokens=64)):
                print(increment.text, end="")

    Use it only on the event loop that starts it. If an engine crashes, another one continues every request where it
    stopped. `LLM` has the same methods.
    """

    info: EngineInfo  # set by `start`

    def __init__(self, model: str = "smollm2", **settings: Any):
        self._set_up(EngineConfig.from_keywords(model=model, **settings))

    @classmethod
    def from_config(
        cls, config: EngineConfig, process: EngineProcess | None = None, found: "FoundModel | None" = None
    ) -> "AsyncLLM":
        """Return an AsyncLLM with exactly these settings. OCTAVO_* variables are ignored.

        Args:
            process: the process for the first engine, if it was started earlier to save time; by default a new one.
            found: what the engines of others (`engines`) serve, if it is known; by default, this waits for one.
        """
        llm = cls.__new__(cls)
        llm._set_up(config, process, found)
        return llm

    def _set_up(
        self, config: EngineConfig, process: EngineProcess | None = None, found: "FoundModel | None" = None
    ) -> None:
        self._is_sleeping = False
        self._engines: FollowedEngines | None = None
        if config.engines is not None:
            self._set_up_remote(config, found)
            return
        self.config = config
        self._path = resolve(config.model, config.revision)
        self._secrets = config.read_secrets()
        self._access = _new_access()
        self._links: list[ProcessLink] = []
        self._begin_loading(process)  # engines load while this process continues
        try:
            self._read_files(unlock(self._path, self._secrets.model_identity))
        except BaseException:
            self.discard()
            raise

    def _set_up_remote(self, config: EngineConfig, found: "FoundModel | None") -> None:
        """Do what `_set_up` does for engines that others run. Waits for one of them, unless `found` is given."""
        try:
            from .network.opening import open_engines  # imported late, with ZeroMQ
        except ModuleNotFoundError:
            raise ConfigError("engines needs pyzmq: pip install 'octavo[server]'") from None

        self._links = []
        self.config, files, follow = open_engines(config, found)
        self._secrets = self.config.read_secrets()
        with files.in_folder() as folder:
            self._read_files(folder)
        self._engines = follow(self._frontend)

    def _read_files(self, files: ModelPath) -> None:
        """Load what the frontend needs of a model's files."""
        config = self.config
        self.tokenizer = Tokenizer.load(files, **config.template_limits)
        self.generation_defaults = generation_defaults(files) if config.generation_config == "auto" else {}
        self.default_sampling_params = SamplingParams(**self.generation_defaults)  # type: ignore[arg-type]
        self._frontend = Frontend(
            config, self.tokenizer, self._connect, has_queue_limit=True, kv_key=self._secrets.kv_key
        )

    def _begin_loading(self, process: EngineProcess | None = None) -> None:
        """Start all engines, or none. Raises OSError."""
        self._links = []
        try:
            for number in range(self.config.data_parallel_size):
                self._links.append(self._connect(number, process if number == 0 else None))
        except BaseException:
            self.discard()
            raise

    def _connect(self, replica: int, process: EngineProcess | None = None) -> ProcessLink:
        return ProcessLink(self.config, self._path, process, replica, self._secrets, self._access)

    def discard(self) -> None:
        """End engines that the constructor has started. Needs no event loop. Does nothing after `start`."""
        for link in self._links:
            link.discard()

    async def start(self) -> None:
        """Wait until all engines are ready, or one of `engines`. Raises any error from loading the model."""
        await self._start()
        self.tokenizer.threads.submit(self.tokenizer.prepare)  # in parallel with the first requests

    async def load(self) -> None:
        """Load engines again after `unload`. Requests that wait for them go on, or fail with the error of the load."""
        try:
            if self._engines is None:
                self._begin_loading()
            await self._start()
        except (OctavoError, OSError) as error:
            self._frontend.fail_all(EngineDead(f"the model cannot be loaded: {error}"))
            raise
        self._is_sleeping = False

    async def _start(self) -> None:
        if self._engines is None:
            self.info = await self._frontend.start(self._links)
        else:
            self.info = await self._engines.start()

    def set_engines(self, urls: Sequence[str]) -> None:
        """Use the engines at other addresses from now on. Requests of engines that are not among them move to others.

        Raises ConfigError if an address is invalid, or the model's engines are not those of others.
        """
        if self._engines is None:
            raise ConfigError("set_engines is for a model of engines that others run; see the setting engines")
        self.config = dataclasses.replace(self.config, engines=list(urls))
        self._engines.set(self.config.engine_addresses)

    def engine_loads(self) -> dict[str, Load]:
        """Return what the router knows about each engine that others run, by address."""
        return self._engines.loads() if self._engines is not None else {}

    async def scale(self, replicas: int) -> None:
        """Start engines, or drain some, until there are `replicas`. Requests of a drained engine move to the others.

        The cores are shared anew only by engines that start later. Raises any error from loading, and ConfigError.
        """
        if self._engines is not None:
            raise ConfigError("others run this model's engines: change their number where they are started")
        before, self.config = self.config, dataclasses.replace(self.config, data_parallel_size=replicas)
        try:
            await self._frontend.scale(replicas)
        except BaseException:
            self.config = before
            raise

    async def unload(self) -> None:
        """End the engine processes and free their memory. KV states are kept. Requests wait until `load` is called.

        Engines that others run go on; this only leaves them.
        """
        self._is_sleeping = True
        if self._engines is not None:
            await self._engines.close()
        await self._frontend.stop()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        request_id: str | None = None,
        *,
        kv_cache_state: KVState | Sequence[KVState] | None = None,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> "Generation":
        """Complete prompts. `await` the result for whole outputs, or iterate over it, as in vLLM, for increments.

        Args:
            prompts: one prompt or several, each as text, as token ids, or as a TextPrompt or TokensPrompt.
            sampling_params: one for all prompts, or one each; `default_sampling_params` by default.
            request_id: the request's id for `abort` and `get_kv_cache_state`; for one prompt only.
            kv_cache_state: the state that the prompts continue, one for all or one each. Its tokens are not computed
                again.
            priority: one for all prompts, or one each.
            terms: tenant, ttft_target, timeout and cache_salt; see ServiceTerms.

        Awaiting raises QueueFull, InvalidRequest, PromptTooLong or InvalidKVState before anything is computed, and
        RequestTimeout, RequestFailed or EngineDead at any time. Either all prompts are accepted or none.
        """

        def requests() -> list[Request]:
            return make_requests(
                prompts, sampling_params, self.default_sampling_params, priority, terms, kv_cache_state
            )

        return Generation(self, requests, request_id)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv_cache_state: KVState | Sequence[KVState] | None = None,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> list[RequestOutput]:
        """Complete prompts. Return one whole RequestOutput for each prompt, in order; see `generate`."""
        return await self.generate(prompts, sampling_params, kv_cache_state=kv_cache_state, priority=priority, **terms)

    async def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
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
        prompts: list[Prompt] = [
            await asyncio.to_thread(chat_tokens, self.tokenizer, one, options) for one in conversations(messages)
        ]
        return await self.agenerate(prompts, sampling_params, priority=priority, **terms)

    def chat_tokens(self, messages: Conversation, **options: Unpack[ChatOptions]) -> list[int]:
        """Render a conversation with the chat template, and return the prompt's token ids."""
        return chat_tokens(self.tokenizer, messages, options)

    async def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        priority: int | Sequence[int] = 0,
        **terms: Unpack[Terms],
    ) -> list[BeamSearchOutput]:
        """Search the likeliest outputs of prompts. Return one BeamSearchOutput for each prompt, in order.

        The arguments besides `params` are those of `generate`.
        """
        requests = make_requests(prompts, None, SamplingParams(temperature=0), priority, terms)
        outputs = await self.beam_search_requests(requests, params)
        return [beam_search_output(output, self.tokenizer) for output in outputs]

    async def beam_search_requests(
        self, requests: list[Request], params: BeamSearchParams, tally: Tally | None = None
    ) -> list[RequestOutput]:
        """Do what `beam_search` does for requests. The best beams are the completions of the outputs.

        Args:
            tally: counts the tokens of the prompts, and those by which beams are extended.
        """
        self._frontend.check_capacity(len(requests) * params.beam_width)
        tokens = await tokenize_all(requests, self.tokenizer, self.info)
        search = BeamSearch(requests, tokens, params, self.tokenizer, self.info, self.config)
        if tally is not None:
            tally.add(sum(map(len, tokens)))
        while tokens := search.tokens:
            search.advance(await self.generate_requests(search.requests(), tokens=tokens))
            if tally is not None:
                tally.add(len(tokens))
        return search.outputs()

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        kv_cache_state: KVState | None = None,
        priority: int = 0,
        **terms: Unpack[Terms],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the increments of one request as they are computed. Their `outputs` hold only the new parts.

        With another `output_kind` of the sampling parameters, they hold the whole output so far, or there is a single
        output at the end. Closing the generator aborts the request. Arguments and exceptions are those of `generate`.
        """
        params = sampling_params or self.default_sampling_params
        request = make_request(prompt, params, priority, terms, kv_cache_state)
        async with aclosing(self.stream_requests([request], request_id)) as steps:
            async for increments in steps:
                for _, increment in increments:
                    yield increment

    async def generate_requests(
        self,
        requests: list[Request],
        request_id: str | None = None,
        *,
        tokens: list[list[int]] | None = None,
        tally: Tally | None = None,
    ) -> list[RequestOutput]:
        """Complete requests. Return one whole RequestOutput for each request, in order; see `generate`.

        Args:
            tokens: the prompts' token ids, if the requests continue earlier ones, which were checked and admitted.
            tally: counts the tokens.
        """
        done: Inbox[LiveRequest] = Inbox()

        def sink(live: LiveRequest, output: RequestOutput | Exception) -> None:
            if isinstance(output, Exception):
                done.fail(output)
            elif output.finished:
                done.put(live)

        lives = await self._submit(requests, sink, request_id, tokens)
        if tally is not None:
            tally.begin(lives)
        try:
            running = len(lives)
            while running:
                running -= len(await done.take())
        except BaseException:
            self._frontend.abort(lives)
            raise
        finally:
            if tally is not None:
                tally.end()
        return [live.whole() for live in lives]

    async def generate_in_turn(self, requests: list[Request], *, tally: Tally | None = None) -> list[RequestOutput]:
        """Do what `generate_requests` does, but the first request alone: the others find its pages in the cache."""
        first = await self.generate_requests(requests[:1], tally=tally)
        return first + (await self.generate_requests(requests[1:], tally=tally) if requests[1:] else [])

    async def stream_requests(
        self, requests: list[Request], request_id: str | None = None, *, tally: Tally | None = None
    ) -> AsyncGenerator[list[Increment], None]:
        """Yield lists of increments: each holds all that have arrived since the one before; see `stream`.

        Args:
            tally: counts the tokens.
        """
        check_streamable(requests)
        inbox: Inbox[RequestOutput] = Inbox()

        def sink(_: LiveRequest, increment: RequestOutput | Exception) -> None:
            if isinstance(increment, Exception):
                inbox.fail(increment)
            else:
                inbox.put(increment)

        lives = await self._submit(requests, sink, request_id)
        if tally is not None:
            tally.begin(lives)
        index = {live.id: i for i, live in enumerate(lives)}
        try:
            running = len(lives)
            while running:
                increments = await inbox.take()
                running -= sum(increment.finished for increment in increments)
                yield [(index[increment.request_id], increment) for increment in increments]
        finally:
            self._frontend.abort(lives)
            if tally is not None:
                tally.end()

    async def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
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
        return [embedding_output(output, params) for output in await self.generate_requests(requests)]

    async def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
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
        return [pooling_output(output, params) for output in await self.generate_requests(requests)]

    async def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
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
        requests = await asyncio.to_thread(
            score_requests, pairs, scoring_params or ScoringParams(), self.tokenizer, self.info, priority, terms
        )
        outputs = (
            await self.generate_in_turn(requests) if share_prefix(pairs) else await self.generate_requests(requests)
        )
        return [scoring_output(output) for output in outputs]

    def check_capacity(self, completions: int) -> None:
        """Raise QueueFull or InvalidRequest if `generate` would refuse so many completions."""
        self._frontend.check_capacity(completions)

    @property
    def is_full(self) -> bool:
        """Return whether `generate` would refuse any request because the queue is full."""
        return self._frontend.is_full

    async def abort(self, request_id: str) -> None:
        """Abort a request. Its iterator yields a last increment with finish_reason "abort"."""
        if live := self._frontend.find(request_id):
            self._frontend.abort([live], notify=True)

    async def get_kv_cache_state(self, request_id: str, index: int = 0) -> KVState:
        """Do what LLM.get_kv_cache_state does. The returned state's `save` is a coroutine function."""
        return self._frontend.kv_states.keep(request_id, index)

    async def load_kv_cache_state(
        self, path: str | Path, *, tenant: str = "", cache_salt: str | None = None
    ) -> KVState:
        """Do what LLM.load_kv_cache_state does."""
        return await self._frontend.kv_states.load(Path(path).absolute(), tenant, cache_salt or "")

    @property
    def kv_cache_states(self) -> StateBook:
        """Return the book of all KV states, in which they can be found by handle. Available after `start`."""
        return self._frontend.states

    async def stats(self) -> EngineStats:
        """Return the engine's statistics, measured between two steps; those of several replicas are added.

        Raises EngineDead if none answers within a second.
        """
        return await self._frontend.engine_stats(STATS_PATIENCE)

    async def replica_stats(self) -> list[ReplicaStats]:
        """Return the statistics of each replica. Raises EngineDead after `close`."""
        return await self._frontend.replica_stats(STATS_PATIENCE)

    async def page_states(self) -> dict[str, bytes]:
        """Return a byte for each KV page of each engine that answers within a second, by the engine's name.

        See octavo.kv.page_map.PageState. Raises EngineDead after `close`.
        """
        return await self._frontend.page_states(STATS_PATIENCE)

    def frontend_stats(self) -> FrontendStats:
        """Return the frontend's statistics. Raises EngineDead after `close`."""
        return self._frontend.stats()

    def readiness(self) -> tuple[bool, str]:
        """Return whether an engine is ready to serve, and its status as text, such as "the engine is ready"."""
        return self._frontend.readiness()

    def max_output(self, params: SamplingParams, prompt_tokens: int) -> int:
        """Return how many tokens all completions of a prompt may have together."""
        return params.num_completions * max_output(params, prompt_tokens, self.info, self.config.max_new_tokens)

    def set_tenant_weight(self, tenant: str, weight: float | None) -> None:
        """Set the share of a tenant under the policy `fair`; None for that of `tenant_weights`."""
        self._frontend.set_tenant_weight(tenant, weight)

    def set_meter(self, meter: Meter) -> None:
        """Measure all requests with `meter` from now on."""
        self._frontend.set_meter(meter)

    def set_tracer(self, tracer: "Tracer") -> None:
        """Make OpenTelemetry spans of all requests from now on."""
        from .frontend.request_spans import RequestSpans  # imported late, with OpenTelemetry

        self._frontend.watch(RequestSpans(tracer, self.config.model_name))

    async def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer."""
        return self.tokenizer

    async def get_metrics(self) -> list[Metric]:
        """Return the engines' statistics as counters and gauges with vLLM's names."""
        return metrics_of(await self.replica_stats(), self.config.model_name)

    async def reset_prefix_cache(self) -> bool:
        """Do what LLM.reset_prefix_cache does."""
        return await self._frontend.reset_prefix_cache()

    async def sleep(self, level: int = 1) -> None:
        """Do what `unload` does, under vLLM's name. Requests wait until `wake_up`. The level must be 1 or 2."""
        check_sleep(level)
        await self.unload()

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Do what `load` does, under vLLM's name, if the model sleeps; see LLM.wake_up."""
        check_sleep(tags=tags)
        if self._is_sleeping:
            await self.load()

    async def is_sleeping(self) -> bool:
        """Return whether the model sleeps."""
        return self._is_sleeping

    async def close(self) -> None:
        """End the engine processes, or leave those of others. Live requests fail with EngineDead."""
        if self._engines is not None:
            await self._engines.close()
        await self._frontend.close()
        self.discard()
        if self._engines is not None:
            await asyncio.to_thread(self._engines.destroy)  # waits shortly for what is queued to be sent

    async def shutdown(self) -> None:
        """Do what `close` does, under the name of LLM's method."""
        await self.close()

    async def __aenter__(self) -> "AsyncLLM":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _submit(
        self, requests: list[Request], sink: Sink, id: str | None, tokens: list[list[int]] | None = None
    ) -> list[LiveRequest]:
        """Tokenize and start requests; see `generate_requests`."""
        if tokens is not None:
            return self._frontend.submit(requests, tokens, sink, id, is_admitted=True)
        self._frontend.check_capacity(sum(request.params.num_completions for request in requests))
        for request in requests:
            check_logprobs(request.params, self.config.max_logprobs, self.info)
        tokens = await tokenize_all(requests, self.tokenizer, self.info)
        return self._frontend.submit(requests, tokens, sink, id)


class Generation:
    """A running completion of prompts. Await it for the whole outputs, or iterate over it for increments, once."""

    def __init__(self, llm: AsyncLLM, requests: Callable[[], list[Request]], request_id: str | None):
        self._llm, self._requests, self._request_id = llm, requests, request_id
        self._increments = self._iterate()

    def __await__(self) -> Generator[Any, None, list[RequestOutput]]:
        return self._llm.generate_requests(self._requests(), self._request_id).__await__()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> RequestOutput:
        return await anext(self._increments)

    async def aclose(self) -> None:
        """Abort the requests that still run."""
        await self._increments.aclose()

    async def _iterate(self) -> AsyncGenerator[RequestOutput, None]:
        async with aclosing(self._llm.stream_requests(self._requests(), self._request_id)) as steps:
            async for increments in steps:
                for _, increment in increments:
                    yield increment


def _new_access() -> PeerAccess | None:
    """Return what lets engines on this machine fetch pages from each other; None without ZeroMQ (octavo[server])."""
    return PeerAccess(LOCAL, secrets.token_bytes(32)) if importlib.util.find_spec("zmq") is not None else None
