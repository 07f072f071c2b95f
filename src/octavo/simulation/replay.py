"""Replay of a trace through engines: in virtual time on simulated backends, in real time on a real one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import assemble
from octavo.engine.messages import EngineRequest, TokenOutput
from octavo.params import SamplingParams
from octavo.simulation import CostModel, SimulatedBackend, VirtualClock

from .placement import EXACT, Live, Placement, Replica
from .tier import SimulatedTransfers
from .trace import Arrivals, Prompts, TraceRequest


@dataclass(slots=True)
class Served:
    """A request of a trace and the times of its tokens, in seconds from the start of the replay.

    Attributes:
        arrival: The time of its arrival.
        first: The time of its first token; None before that.
        last: The time of its last token.
        problem: The reason why it did not get all its tokens; None if it did.
    """

    request: TraceRequest
    arrival: float
    first: float | None = None
    last: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    problem: str | None = None

    def take(self, output: TokenOutput, now: float) -> None:
        """Record an output of the engine."""
        self.cached_tokens = output.cached_tokens
        if output.token >= 0:
            self.first = now if self.first is None else self.first
            self.last = now
            self.output_tokens += 1
        if output.finish_reason and output.finish_reason != "length":
            self.problem = output.message or output.finish_reason


@dataclass(slots=True)
class Gauge:
    """A quantity over time: its peak, and its integral in seconds."""

    peak: int = 0
    integral: float = 0.0

    def hold(self, value: int, seconds: float) -> None:
        """Record that the quantity had `value` for `seconds`."""
        self.peak = max(self.peak, value)
        self.integral += value * seconds


@dataclass(slots=True)
class Use:
    """What a replica did in a replay.

    Attributes:
        busy: Seconds in which a step was running.
        requests: Number of requests that ended there.
        tokens_computed: Rows of all its steps: tokens of prompts that were not cached, and output tokens.
    """

    busy: float = 0.0
    requests: int = 0
    tokens_computed: int = 0


@dataclass(slots=True)
class Replay:
    """The result of replaying a trace.

    Attributes:
        seconds: Duration of the replay.
        replicas: What each replica did.
        pages: Pages held by sequences. This and the following gauges are those of all replicas, one after another.
        num_pages: Pages of one replica.
        moves: Number of times that a waiting request was moved to another replica.
    """

    served: list[Served] = field(default_factory=list)
    seconds: float = 0.0
    replicas: list[Use] = field(default_factory=list)
    pages: Gauge = field(default_factory=Gauge)
    running: Gauge = field(default_factory=Gauge)
    waiting: Gauge = field(default_factory=Gauge)
    num_pages: int = 0
    steps: int = 0
    preemptions: int = 0
    pages_fetched: int = 0
    moves: int = 0

    @property
    def busy(self) -> float:
        """Return the seconds in which a step was running, in the mean of the replicas."""
        return sum(use.busy for use in self.replicas) / len(self.replicas)

    def note(self, engine: Engine, seconds: float) -> None:
        """Record an engine's state, which lasted for `seconds`."""
        pool, scheduler = engine.kv.pool, engine.scheduler
        self.pages.hold(pool.num_pages - pool.num_available, seconds)
        self.running.hold(len(scheduler.running), seconds)
        self.waiting.hold(scheduler.num_waiting, seconds)


def simulate(
    trace: Sequence[TraceRequest],
    config: EngineConfig,
    costs: CostModel,
    num_pages: int,
    advance: Callable[[int], None] = lambda finished: None,
    routing: str = EXACT,
) -> Replay:
    """Replay a trace in virtual time, on config.data_parallel_size replicas.

    Args:
        config: The engines' settings.
        costs: The time of their steps.
        num_pages: Pages of the KV cache of each engine.
        advance: Called with the number of requests that have just finished.
        routing: How requests are distributed among replicas, one of placement.ROUTINGS.
    """
    replicas = [_simulated_replica(config, costs, num_pages) for _ in range(config.data_parallel_size)]
    max_live = config.max_batch_size * len(replicas) + config.max_queue
    return _Run(trace, Placement(replicas, routing, config.max_batch_tokens), max_live, advance).run()


def replay(
    trace: Sequence[TraceRequest],
    engine: Engine,
    wait: Callable[[float], None],
    max_live: int,
    advance: Callable[[int], None] = lambda finished: None,
) -> Replay:
    """Add each request to the engine at its time of arrival, and step the engine until all have finished.

    Args:
        trace: In order of arrival.
        wait: Waits for a number of seconds on the engine's clock.
        max_live: Maximum number of requests that run or wait; further ones are refused, as by a server.
        advance: Called with the number of requests that have just finished.
    """
    placement = Placement([Replica(engine, wait)], EXACT, engine.scheduler.max_batch_tokens)
    return _Run(trace, placement, max_live, advance).run()


def _simulated_replica(config: EngineConfig, costs: CostModel, num_pages: int) -> Replica:
    clock = VirtualClock()
    backend = SimulatedBackend(costs, clock)
    below = _lower_tier_bytes(config) // costs.page_bytes
    engine = assemble(
        config,
        backend,
        num_pages=num_pages,
        max_model_len=config.max_model_len or costs.max_model_len,
        transfers=SimulatedTransfers(backend, clock, below, costs.seconds_per_page) if below else None,
        clock=clock,
    )
    return Replica(engine, clock.advance)


def _lower_tier_bytes(config: EngineConfig) -> int:
    """Return the capacity of the tiers below the pool."""
    return (config.kv_host_memory or 0) + (config.kv_disk_size if config.kv_disk else 0)


class _Run:
    """One replay. It handles events in order of time: arrivals, and the ends of steps."""

    def __init__(
        self, trace: Sequence[TraceRequest], placement: Placement, max_live: int, advance: Callable[[int], None]
    ):
        self._arrivals, self._placement, self._max_live, self._advance = Arrivals(trace), placement, max_live, advance
        self._prompts, self._live = Prompts(), dict[int, Served]()
        self._done = Replay(replicas=[Use() for _ in placement.replicas])

    def run(self) -> Replay:
        replicas, done = self._placement.replicas, self._done
        before = [replica.engine.stats() for replica in replicas]
        while True:
            busy = min((r for r in replicas if r.is_busy), key=lambda r: r.now, default=None)
            arrival = self._arrivals.next_at
            if arrival is not None and (busy is None or arrival <= busy.now):
                self._arrive()
            elif busy is not None:
                self._end_step(busy)
                self._begin_step(busy)
            else:
                break
        done.seconds, done.moves = max(replica.now for replica in replicas), self._placement.moves
        for use, replica, was in zip(done.replicas, replicas, before, strict=True):
            stats = replica.engine.stats()
            use.tokens_computed = stats.tokens_computed - was.tokens_computed
            done.num_pages = stats.num_pages
            done.steps += stats.steps - was.steps
            done.preemptions += stats.preemptions - was.preemptions
            done.pages_fetched += stats.pages_fetched - was.pages_fetched
        return done

    def _arrive(self) -> None:
        at, index = self._arrivals.pop()
        request = self._arrivals.trace[index]
        prompt = self._prompts.tokens(request)
        served = Served(request, at, prompt_tokens=len(prompt))
        self._done.served.append(served)
        if len(self._live) >= self._max_live:
            served.problem = "the queue is full"
            self._arrivals.ended(index, at)
            self._advance(1)
            return
        self._live[index] = served
        self._placement.place(Live(_engine_request(request, str(index), prompt), at))

    def _begin_step(self, replica: Replica) -> None:
        """Compute a step. Its outputs are delivered at its end, after everything that arrives before."""
        if not replica.engine.has_work:
            return
        started = replica.now
        replica.outputs = replica.engine.step()
        seconds = replica.now - started
        self._done.note(replica.engine, seconds)
        if replica.outputs or replica.engine.scheduler.running:  # otherwise it waits for pages
            self._done.replicas[self._placement.replicas.index(replica)].busy += seconds

    def _end_step(self, replica: Replica) -> None:
        """Deliver the outputs of a step."""
        now, ended = replica.now, 0
        for output in self._placement.step_ended(replica):
            index = int(output.id)
            self._live[index].take(output, now)
            if output.finish_reason:
                del self._live[index]
                self._done.replicas[self._placement.replicas.index(replica)].requests += 1
                self._arrivals.ended(index, now)
                ended += 1
        self._advance(ended)


def _engine_request(request: TraceRequest, id: str, prompt: list[int]) -> EngineRequest:
    return EngineRequest(
        id=id,
        prompt=prompt,
        params=SamplingParams(temperature=0, max_tokens=request.output_tokens, ignore_eos=True, seed=0),
        tenant=request.tenant,
        priority=request.priority,
        ttft_target=request.ttft_target,
        timeout=request.timeout,
    )
