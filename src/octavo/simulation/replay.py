"""Replay of a trace through an engine: in virtual time on a simulated backend, in real time on a real one."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import assemble
from octavo.engine.messages import EngineRequest, TokenOutput
from octavo.params import SamplingParams
from octavo.simulation import CostModel, SimulatedBackend, VirtualClock

from .tier import SimulatedTransfers
from .trace import Prompts, TraceRequest


@dataclass(slots=True)
class Served:
    """A request of a trace and the times of its tokens, in seconds from the start of the replay.

    Attributes:
        first: The time of its first token; None before that.
        last: The time of its last token.
        problem: The reason why it did not get all its tokens; None if it did.
    """

    request: TraceRequest
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
class Replay:
    """The result of replaying a trace.

    Attributes:
        seconds: Duration of the replay.
        busy: Seconds in which a step was running.
    """

    served: list[Served] = field(default_factory=list)
    seconds: float = 0.0
    busy: float = 0.0
    pages: Gauge = field(default_factory=Gauge)  # held by sequences
    running: Gauge = field(default_factory=Gauge)
    waiting: Gauge = field(default_factory=Gauge)
    num_pages: int = 0
    steps: int = 0
    preemptions: int = 0
    pages_fetched: int = 0

    def note(self, engine: Engine, seconds: float) -> None:
        """Record the engine's state, which lasted for `seconds`."""
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
) -> Replay:
    """Replay a trace in virtual time.

    Args:
        config: The engine's settings.
        costs: The time of its steps.
        num_pages: Pages of its KV cache.
        advance: Called with the number of requests that have just finished.
    """
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
    return replay(trace, engine, clock.advance, config.max_batch_size + config.max_queue, advance)


def _lower_tier_bytes(config: EngineConfig) -> int:
    """Return the capacity of the tiers below the pool."""
    return (config.kv_host_memory or 0) + (config.kv_disk_size if config.kv_disk else 0)


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
    done, prompts = Replay(), Prompts()
    before, start = engine.stats(), engine.clock()
    arrivals, live = deque(trace), dict[str, Served]()
    while arrivals or engine.has_work:
        now = engine.clock() - start
        while arrivals and arrivals[0].at <= now:
            request = arrivals.popleft()
            prompt, id = prompts.tokens(request), str(len(done.served))
            served = Served(request, prompt_tokens=len(prompt))
            done.served.append(served)
            if len(live) < max_live:
                live[id] = served
                engine.add(_engine_request(request, id, prompt, now))
            else:
                served.problem = "the queue is full"
                advance(1)
        if not engine.has_work:
            if arrivals:
                wait(max(0.0, arrivals[0].at - now))
            continue
        outputs = engine.step()
        ended = engine.clock() - start
        done.note(engine, ended - now)
        done.busy += ended - now if outputs or engine.scheduler.running else 0.0  # otherwise it waits for pages
        unfinished = len(live)
        for output in outputs:
            live[output.id].take(output, ended)
            if output.finish_reason:
                del live[output.id]
        advance(unfinished - len(live))
    after = engine.stats()
    done.seconds, done.num_pages = engine.clock() - start, after.num_pages
    done.steps, done.preemptions = after.steps - before.steps, after.preemptions - before.preemptions
    done.pages_fetched = after.pages_fetched - before.pages_fetched
    return done


def _engine_request(request: TraceRequest, id: str, prompt: list[int], now: float) -> EngineRequest:
    return EngineRequest(
        id=id,
        prompt=prompt,
        params=SamplingParams(temperature=0, max_tokens=request.output_tokens, ignore_eos=True, seed=0),
        age=now - request.at,
        tenant=request.tenant,
        priority=request.priority,
        ttft_target=request.ttft_target,
        timeout=request.timeout,
    )
