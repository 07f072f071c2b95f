"""Frontend: keeps live requests while the engines that serve them may crash, be replaced, come and go at any time."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence

from octavo.address import Address
from octavo.config import EngineConfig
from octavo.engine.messages import EngineInfo, EngineStats, TokenOutput
from octavo.errors import ConfigError, EngineDead, InvalidRequest, OctavoError, QueueFull, RequestFailed, RequestTimeout
from octavo.outputs import FinishReason, RequestOutput
from octavo.states import StateBook
from octavo.states.handle import StateOwner
from octavo.text import Tokenizer

from .admission import Admission
from .calls import Calls
from .kv_events import KVEvents
from .kv_states import KVStates
from .ledger import Ledger
from .links.link import Exit, Link
from .links.messages import (
    Abort,
    CacheReset,
    FromEngine,
    Leaving,
    Pages,
    PageStates,
    StateDone,
    Stats,
    Submit,
    Tokens,
    WatchPages,
)
from .live import LiveRequest, Sink
from .meter import Meter
from .placement import Placement, is_for_prompts
from .readmission import TRIAL_TOKENS
from .replica import Replica
from .request_trace import RequestTrace
from .request_watcher import RequestWatcher
from .requests import Request
from .stats import MAX_TENANTS, FrontendStats, ReplicaStats, total

NAMED = 3  # engines whose state `readiness` explains
PAGES_PATIENCE = 1.0  # seconds that a drained engine stays for those that fetch pages from it
DRAIN_LOOK = 0.02  # seconds between checks of a replica that is drained
FAILURES: dict[str, type[OctavoError]] = {
    "error": RequestFailed,
    "invalid": InvalidRequest,
    "timeout": RequestTimeout,
}
"""The errors of requests that an engine has ended, by its `finish_reason`."""

log = logging.getLogger("octavo")


class Frontend:
    """The requests of one model, its KV states, and the replicas that serve them.

    Call all methods on the event loop that calls `start`; sinks are called on it too. If a sink raises, its own request
    is aborted.

    Args:
        connect: starts an engine, which begins to load the model; called with the replica's number, from 0.
        has_queue_limit: whether `submit` raises QueueFull beyond the completions that replicas run at once plus
            max_queue.
        state_owner, kv_key: see KVStates.

    Attributes:
        kv_states: makes, saves and loads KV states.
        meter: measures the requests, if it is set.
        was_ready: set when the first engine is ready, which determines `info`.
        on_leaving: called with a replica whose engine will be ended by others.

    Raises ConfigError if the trace file cannot be written, or there is a role.
    """

    info: EngineInfo  # set by `start`

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        connect: Callable[[int], Link],
        has_queue_limit: bool,
        state_owner: StateOwner | None = None,
        kv_key: str | None = None,
    ):
        if config.role != "both":
            raise ConfigError("role is for octavo engine: each engine of octavo serve does both")
        self._config, self._tokenizer, self._connect = config, tokenizer, connect
        self._watchers: list[RequestWatcher] = []
        if config.trace is not None:
            self._watchers.append(RequestTrace(config.trace, config.model_name))
        at_once = config.max_batch_size * config.data_parallel_size
        self._admission = Admission(at_once, config.max_queue) if has_queue_limit else None
        self._ledger: Ledger | None = None
        self.placement = Placement(config.max_batch_tokens)
        self._calls = Calls()
        self.kv_states = KVStates(
            self.placement, self._calls, self._living, lambda: self.readiness()[1], state_owner, kv_key
        )
        self._events: KVEvents | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._deadline_at: float | None = None  # time.monotonic()
        self._timed_out = 0
        self._closed = False
        self.meter: Meter | None = None
        self._tenant_weights: dict[str, float] = {}
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.was_ready = asyncio.Event()
        self.on_leaving: Callable[[Replica], None] = lambda replica: None

    @property
    def states(self) -> StateBook:
        """Return all KV states, in which they can be found by handle. Available after `start`."""
        return self.kv_states.book

    @property
    def replicas(self) -> list[Replica]:
        """Return the replicas that serve or are loading."""
        return self.placement.replicas

    async def start(self, links: Sequence[Link]) -> EngineInfo:
        """Wait until the engines that `links` have begun to load are ready, each in a replica of its own.

        Raises any error from loading the model, and DamagedWeights if the tokenizer has tokens that the model lacks.
        Then all engines have ended.
        """
        self._loop = asyncio.get_running_loop()
        _ = self._tokenizer.last_token_id  # computed while the engines load
        self.placement.replicas = [self._new_replica(number, len(links)) for number in range(len(links))]
        starts = [replica.start(link) for replica, link in zip(self.replicas, links, strict=True)]
        try:
            results = await asyncio.gather(*starts, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        except BaseException:  # also if this is cancelled while some engines are ready
            await self.stop()
            raise
        return self.info

    def add_remote(self, connect: Callable[[Replica], Link], name: str, max_pause: float) -> Replica:
        """Return a new replica for an engine that others run. It serves as soon as the engine can be reached.

        Args:
            connect: makes a connection to the engine.
            max_pause: seconds between two attempts.
        """
        self._loop = asyncio.get_running_loop()
        taken = {replica.number for replica in self.replicas}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        replica = Replica(lambda: connect(replica), self, self.placement.router.new_replica(), number, name, max_pause)
        self.replicas.append(replica)
        for other in self.replicas if len(self.replicas) == 2 else ():  # later ones are asked when they are ready
            other.send(self._watch_pages())
        self._resize()
        replica.begin()
        return replica

    def _resize(self) -> None:
        if self._admission is not None:
            self._admission.resize(self._config.max_batch_size * max(1, len(self.replicas)))

    async def stop(self) -> None:
        """End all engines. Requests that they had, and later ones, wait until `start` is called again."""
        self.was_ready.clear()
        replicas, self.placement.replicas = self.replicas, []
        for replica in replicas:
            self._take_all_back(replica)
        await asyncio.gather(*(self._close_replica(replica) for replica in replicas))

    async def drain(self, replica: Replica) -> None:
        """Move a replica's requests to the other ones, then end it. Without an open one, wait until they have ended.

        The engine stays until those that moved have fetched their pages from it, but not longer than PAGES_PATIENCE.
        Requests on trial stay until their trial ends; see Readmission. If the engine of others is gone meanwhile, its
        requests wait for another replica.
        """
        replica.is_leaving, begun = True, time.monotonic()
        moved: list[LiveRequest] = []
        while replica in self.replicas and (self._lives_of(replica) or self.placement.place_interrupted(replica)):
            if not replica.is_ready and replica.link is not None and replica.link.is_remote:
                self._take_all_back(replica)
                self.placement.place_waiting()
                break
            if not replica.ended.is_set() and self.placement.has_open_replica:
                for live in self._lives_of(replica):
                    if live.sent and not replica.readmission.is_on_trial(live):
                        self.placement.move(live)
                        moved.append(live)
            await asyncio.sleep(DRAIN_LOOK)
        deadline = time.monotonic() + PAGES_PATIENCE
        while time.monotonic() < deadline and any(live.is_fetching_from(replica) for live in moved):
            await asyncio.sleep(DRAIN_LOOK)
        log.warning("%s is drained: it has no request after %.2f s", replica.name, time.monotonic() - begun)
        await self._close_replica(replica)
        if replica in self.replicas:
            self.replicas.remove(replica)
            self._resize()

    async def scale(self, count: int) -> None:
        """Start or drain replicas until there are `count`. Raises any error from loading; then none is added."""
        try:
            for replica in self.replicas[count:]:
                await self.drain(replica)
            if count > len(self.replicas):
                await self._add_replicas(count)
        finally:
            self._resize()

    async def _add_replicas(self, count: int) -> None:
        added = [self._new_replica(number, count) for number in range(len(self.replicas), count)]
        self.placement.replicas += added
        for replica in self.replicas:
            replica.name = f"engine {replica.number}"
            replica.send(self._watch_pages())

        async def start(replica: Replica) -> None:
            await replica.start(self._connect(replica.number))

        results = await asyncio.gather(*map(start, added), return_exceptions=True)
        for error in (result for result in results if isinstance(result, BaseException)):
            for replica in added:
                await self.drain(replica)
            raise error

    def readiness(self) -> tuple[bool, str]:
        """Return whether an engine is ready to serve, and the status as text, such as "the engine is ready"."""
        ready = sum(replica.is_ready for replica in self.replicas)
        if len(self.replicas) == 1:
            return ready > 0, f"the engine {self.replicas[0].status}"
        text = f"{ready} of {len(self.replicas)} engines are ready"
        if self.replicas and not ready:
            text += "; " + "; ".join(f"{replica.name} {replica.status}" for replica in self.replicas[:NAMED])
        return ready > 0, text

    # Requests

    def check_capacity(self, completions: int) -> None:
        """Raise QueueFull or InvalidRequest if `submit` would refuse so many completions; EngineDead."""
        ledger = self._living()
        if self._admission is not None:
            try:
                self._admission.check(ledger.num_completions, completions)
            except QueueFull:
                if self.meter is not None:
                    self.meter.refused += 1
                raise

    @property
    def is_full(self) -> bool:
        """Return whether `check_capacity(1)` would raise QueueFull."""
        ledger, admission = self._ledger, self._admission
        return ledger is not None and admission is not None and ledger.num_completions >= admission.limit

    def submit(
        self,
        requests: list[Request],
        tokens: list[list[int]],
        sink: Sink,
        request_id: str | None = None,
        is_admitted: bool = False,
    ) -> list[LiveRequest]:
        """Start all requests, or none if one of them is invalid.

        Args:
            tokens: the prompts' token ids, from `requests.tokenize`.
            sink: called with the live request and each of its outputs, or with the error that ended it.
            request_id: the id of a single request; by default a random one.
            is_admitted: whether the requests continue earlier ones, so that they are not refused if the queue is full.

        Raises QueueFull, InvalidRequest, PromptTooLong, InvalidKVState, EngineDead.
        """
        if not is_admitted:
            self.check_capacity(sum(request.params.num_completions for request in requests))
        ledger, lives = self._living(), list[LiveRequest]()
        try:
            for request, prompt in zip(requests, tokens, strict=True):
                lives.append(ledger.open(request, self.kv_states.continued(request, prompt), sink, request_id))
        except BaseException:
            for live in lives:
                ledger.close(live)
            raise
        for live, request in zip(lives, requests, strict=True):
            for watcher in self._watchers:
                watcher.arrived(live, request.reply_id)
            self.placement.place(live)
        self._watch_deadlines()
        return lives

    def abort(self, lives: Iterable[LiveRequest], notify: bool = False) -> None:
        """Abort requests. Requests that have ended are ignored.

        Args:
            notify: whether to send the sink a last increment with finish_reason "abort".
        """
        for live in lives:
            if self._close(live, "abort", "aborted") and notify:
                self._deliver(live, live.abort())

    def set_tenant_weight(self, tenant: str, weight: float | None) -> None:
        """Set the weight of a tenant's requests from now on; None for that of the engine's settings."""
        if weight is None:
            self._tenant_weights.pop(tenant, None)
        else:
            self._tenant_weights[tenant] = weight

    def find(self, request_id: str) -> LiveRequest | None:
        return self._ledger.get(request_id) if self._ledger is not None else None

    def stats(self) -> FrontendStats:
        """Return the frontend's statistics. Raises EngineDead."""
        ledger, admission = self._living(), self._admission
        limit, refused = (admission.limit, admission.refused) if admission else (0, 0)
        tenants = dict(ledger.count_tenants().most_common(MAX_TENANTS))
        return FrontendStats(ledger.num_completions, limit, refused, self._timed_out, tenants)

    async def replica_stats(self, patience: float | None = None) -> list[ReplicaStats]:
        """Return the statistics of each replica. Its engine's are None if it does not answer within `patience` seconds.

        Raises EngineDead after `close`.
        """
        self._living()
        replicas = list(self.replicas)
        asked = (self._calls.stats(replica, patience) for replica in replicas)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [
            ReplicaStats(
                name=replica.name,
                pid=replica.link.pid if replica.link is not None else None,
                is_ready=replica.is_ready,
                status=str(answer) if isinstance(answer, EngineDead) else f"the engine {replica.status}",
                completions=replica.load.completions,
                queued_tokens=replica.load.queued_tokens,
                role=replica.load.role,
                engine=answer if isinstance(answer, EngineStats) else None,
            )
            for replica, answer in zip(replicas, answers, strict=True)
        ]

    async def page_states(self, patience: float | None = None) -> dict[str, bytes]:
        """Return the states of the pages of each replica that answers within `patience` seconds, by its name.

        Raises EngineDead after `close`.
        """
        self._living()
        replicas = list(self.replicas)
        asked = (self._calls.page_states(replica, patience) for replica in replicas)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return {replica.name: each for replica, each in zip(replicas, answers, strict=True) if isinstance(each, bytes)}

    async def engine_stats(self, patience: float | None = None) -> EngineStats:
        """Return the sum of the statistics of all engines that answer within `patience` seconds.

        Raises EngineDead if there is none.
        """
        replicas = await self.replica_stats(patience)
        if engines := [replica.engine for replica in replicas if replica.engine is not None]:
            return total(engines)
        raise EngineDead(replicas[0].status if replicas else "no engine is loaded")

    async def reset_prefix_cache(self) -> bool:
        """Evict the cached pages of all engines. Return False if requests use pages of one. Raises EngineDead."""
        self._living()
        return all(await asyncio.gather(*(self._calls.reset_cache(replica) for replica in self.replicas)))

    # Watching

    def watch(self, watcher: RequestWatcher) -> None:
        """Tell `watcher` about all requests from now on."""
        self._watchers.append(watcher)
        if self._ledger is not None:
            self._ledger.is_traced = True

    def set_meter(self, meter: Meter) -> None:
        """Measure all requests with `meter` from now on. What running ones have got before is not counted."""
        self.meter, now = meter, time.monotonic()
        for live in self._ledger or ():
            for completion in live.completions:
                if completion.token_ids:
                    live.prompt_metered = True
                    completion.num_metered, completion.metered_at = len(completion.token_ids), now

    # The end

    async def close(self) -> None:
        """End all engines. Live requests fail with EngineDead."""
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        error = EngineDead("the engine was shut down")
        self.fail_all(error)
        for replica in self.replicas:
            self._calls.fail(replica, error)
        await self.stop()
        if self._events is not None:
            self._events.close()
        for watcher in self._watchers:
            watcher.close()

    def fail_all(self, error: OctavoError) -> None:
        """End all live requests with an error."""
        for live in self._ledger or ():
            self._fail(live, error)

    # Callbacks of the replicas (see ReplicaOwner)

    async def replica_ready(self, replica: Replica, info: EngineInfo) -> None:
        if self._ledger is None:
            self._ledger = self._begin(info)
        elif info.fingerprint != self.info.fingerprint:
            raise EngineDead(self._other_model(replica))
        elif info.max_model_len < self.info.max_model_len:
            raise EngineDead(
                f"its max_model_len is {info.max_model_len}, and that of the others {self.info.max_model_len}: give "
                "all the same --max-model-len"
            )
        replica.load.role = info.role
        await self.kv_states.open_files(replica)
        if replica.ended.is_set():
            raise EngineDead("the engine ended before it served requests")
        for watcher in self._watchers:
            watcher.engine_ready(replica)
        if len(self.replicas) > 1 or self._events is not None:
            replica.send(self._watch_pages())
        if interrupted := sum(live.was_sent and not live.sent for live in self._ledger):
            log.warning("a new engine continues %d requests", interrupted)
        self.was_ready.set()
        replica.readmission.engine_ready()

    def _begin(self, info: EngineInfo) -> Ledger:
        """Take over what the first engine determines. If this raises, it is tried again with the next engine."""
        config = self._config
        self._tokenizer.check_vocabulary(info.vocab_size)
        if config.kv_events is not None:
            self._events = KVEvents(config.kv_events, config.kv_events_replay, info.page_size)
        self.info = self.placement.info = info
        self.kv_states.begin(config)
        ledger = Ledger(
            self._tokenizer,
            info,
            config.request_timeout,
            config.reasoning_parser,
            config.max_new_tokens,
            is_traced=bool(self._watchers),
            is_alone=config.engines is None,
        )
        ledger.tenant_weights = self._tenant_weights
        return ledger

    def _other_model(self, replica: Replica) -> str:
        if replica.link is None or replica.link.is_remote:
            return "its weights, version or settings differ from those of the others, so its tokens might too"
        return "the model's files have changed since the start: restore them, or restart Octavo"

    def replica_lost(self, replica: Replica, exit: Exit) -> None:
        self._calls.fail(replica, EngineDead(f"the engine ended ({exit.reason})"))
        replica.load.clear()
        for watcher in self._watchers:
            watcher.engine_lost(replica, exit.reason)
        if self._events is not None:
            self._events.cleared(replica.number)
        if self.meter is not None:
            self.meter.engine(replica.number).restarts += 1
        culprit, others = replica.readmission.engine_lost(self._lives_of(replica), exit)
        self.placement.wait_first(others)
        if others and self.placement.has_open_replica:
            log.warning("other engines continue %d requests of %s", len(others), replica.name)
        if culprit:
            reason = f"the engine failed {culprit.crashes} times while it served this request ({exit.reason})"
            log.error("the request %s is aborted: %s", culprit.id, reason)
            self._fail(culprit, RequestFailed(reason))
        self.placement.place_waiting()

    def replica_delayed(self, replica: Replica) -> None:
        if self.placement.has_open_replica:  # better at risk there than waiting here without end
            self.placement.wait_first(replica.readmission.release())
            self.placement.place_waiting()

    def replica_opened(self, replica: Replica) -> None:
        self.placement.place_waiting()

    def replica_send(self, replica: Replica, live: LiveRequest) -> None:
        assert self._ledger is not None and self._loop is not None
        if live.was_sent:
            self._ledger.renew(live)
        for watcher in self._watchers:
            watcher.sent(live, replica)
        live.replica, live.was_sent = replica, True
        if live.source is not None and live.source.address == replica.load.address:  # it was meant for another replica
            live.source = None
        owed = live.owed()
        replica.load.add(live, live.tokens_to_compute, len(owed))
        try:
            replica.send(Submit(owed))
        except Exception as error:  # a request that cannot be encoded fails alone
            # Later: its sink may abort or submit requests, which the caller is placing.
            self._loop.call_soon(self._fail, live, InvalidRequest(f"the request cannot be sent: {error}"))

    def replica_message(self, replica: Replica, message: FromEngine) -> None:
        match message:
            case Tokens():
                for watcher in self._watchers:
                    self._tell(watcher, replica, message)
                self._take_tokens(replica, message.outputs)
            case Pages():
                if not replica.load.publish(message.number, message.gained, message.lost):
                    replica.send(self._watch_pages())
                    return
                if message.port and replica.link is not None and replica.link.host:
                    replica.load.address = str(Address(replica.link.host, message.port))
                if self._events is not None:
                    self._events.changed(replica.number, message)
            case Stats() | PageStates() | StateDone() | CacheReset():
                self._calls.answered(replica, message)
            case Leaving():
                self.on_leaving(replica)

    def _tell(self, watcher: RequestWatcher, replica: Replica, message: Tokens) -> None:
        """Tell a watcher what an engine did in a step."""
        assert self._ledger is not None
        if message.trace:
            watcher.engine_times(message.trace)
        for event in message.events:
            found = self._ledger.find(event.sequence)
            if found is not None and found[0].replica is replica:  # otherwise it was aborted, or continues elsewhere
                watcher.happened(found[0], replica, event)

    def _take_tokens(self, replica: Replica, outputs: list[TokenOutput]) -> None:
        """Pass the tokens of a step on to the sinks."""
        assert self._ledger is not None
        live_before, ended, stopped = self._ledger.num_completions, 0, list[str]()
        meter, now = self.meter.engine(replica.number) if self.meter else None, time.monotonic()
        hands_over = is_for_prompts(replica)
        for output in outputs:
            if (found := self._ledger.find(output.id)) is None or found[0].replica is not replica:
                continue  # the request was aborted, or continues elsewhere
            live, completion = found
            if failure := FAILURES.get(output.finish_reason or ""):
                self._timed_out += failure is RequestTimeout
                self._fail(live, failure(output.message or "the engine could not continue this request"))
                continue
            is_first = live.metrics.first_token_time is None
            try:
                increment = live.advance(completion, output)
            except Exception as error:
                log.exception("the request %s failed", live.id)
                self._fail(live, RequestFailed(f"{type(error).__name__}: {error}"))
                continue
            if meter is not None:
                meter.advanced(live, completion, now)
            if completion.finish_reason:
                self._ledger.finish(completion)
                self.placement.router.ended(len(completion.token_ids))
                replica.load.completions -= 1
                ended += 1
                if not output.finish_reason:  # a stop string or a repetition ended it, which the engine does not know
                    stopped.append(output.id)
            if live.progress < TRIAL_TOKENS:
                replica.load.started(live)
                live.metrics.replica = live.metrics.replica or (replica.name if len(self.replicas) > 1 else None)
                replica.readmission.progressed(live)
            if is_first:
                for watcher in self._watchers:
                    watcher.first_token(live)
            if live.finished:
                self.kv_states.remember(live)
                replica.readmission.ended(live)
                for watcher in self._watchers:
                    watcher.ended(live)
            if increment is not None:
                self._deliver(live, increment)
            if hands_over and not live.finished:
                self.placement.hand_over(live)
        if stopped:
            replica.send(Abort(stopped))
        if self._admission is not None:
            self._admission.left(ended, live_before)
        if len(self.replicas) > 1:
            self.placement.relieve_others(replica)

    # Inside

    def _living(self) -> Ledger:
        """Return the ledger. Raises EngineDead if this process, event loop or frontend cannot serve requests."""
        if os.getpid() != self._pid:
            raise EngineDead("this LLM belongs to the process that was forked: create one in this process")
        if self._loop is not None and asyncio.get_running_loop() is not self._loop:
            raise EngineDead("this LLM belongs to another event loop: create and use it within one asyncio.run")
        if self._closed or self._ledger is None:
            raise EngineDead("the engine was shut down" if self._closed else "call start() first")
        return self._ledger

    def _watch_pages(self) -> WatchPages:
        """Return the message by which an engine begins to publish its pages."""
        return WatchPages(with_content=self._events is not None, with_serving=len(self.replicas) > 1)

    def _new_replica(self, number: int, of: int) -> Replica:
        name = f"engine {number}" if of > 1 else "the engine"
        return Replica(lambda: self._connect(number), self, self.placement.router.new_replica(), number, name)

    async def _close_replica(self, replica: Replica) -> None:
        await replica.close()
        self.placement.router.remove(replica.load)
        self._calls.fail(replica, EngineDead("the engine was shut down"))

    def _take_all_back(self, replica: Replica) -> None:
        """Let all requests of a replica wait for another one."""
        for live in self._lives_of(replica):
            self.placement.take_back(live)
            self.placement.waiting[live] = None

    def _lives_of(self, replica: Replica) -> list[LiveRequest]:
        return [live for live in self._ledger or () if live.replica is replica]

    def _deliver(self, live: LiveRequest, output: RequestOutput | Exception) -> None:
        try:
            live.sink(live, output)
        except Exception:
            log.exception("the sink of the request %s raised, so the request is aborted", live.id)
            self._close(live, "abort", "aborted")

    def _fail(self, live: LiveRequest, error: Exception) -> None:
        if self._close(live, "error", f"{type(error).__name__}: {error}"):
            self._deliver(live, error)

    def _close(self, live: LiveRequest, reason: FinishReason, cause: str) -> bool:
        """End a request, here and in the engine. Return whether it was live. The cause is for the trace."""
        assert self._ledger is not None
        live_before = self._ledger.num_completions
        if not self._ledger.close(live):
            return False
        if self.meter is not None:
            self.meter.engine(live.replica.number if live.replica else 0).ended_early(live, reason)
        self.placement.take_back(live)
        for watcher in self._watchers:
            watcher.ended(live, cause)
        self._count_left(live_before)
        return True

    def _count_left(self, live_before: int) -> None:
        assert self._ledger is not None
        if self._admission is not None:
            self._admission.left(live_before - self._ledger.num_completions, live_before)

    def _watch_deadlines(self) -> None:
        """Schedule `_time_out` for the next deadline."""
        assert self._ledger is not None
        if (at := self._ledger.next_deadline) == self._deadline_at:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline_at = at
        if at is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_at(loop.time() + at - time.monotonic(), self._time_out)

    def _time_out(self) -> None:
        assert self._ledger is not None
        self._deadline_at = None
        for live in self._ledger.overdue():
            self._timed_out += 1
            message = f"the request did not end within its timeout of {live.timeout:g} seconds"
            self._fail(live, RequestTimeout(message))
        self._watch_deadlines()
