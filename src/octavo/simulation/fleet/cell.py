"""Cell: one frontend and its engines in virtual time, with the frontend's own router, placement and readmission."""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, cast

import msgspec
import numpy as np

from octavo.config import EngineConfig
from octavo.engine.messages import EngineRequest, TokenOutput
from octavo.engine.work_record import Work
from octavo.errors import QueueFull
from octavo.frontend.admission import Admission
from octavo.frontend.links.link import Exit
from octavo.frontend.links.messages import Abort
from octavo.frontend.live import LiveCompletion, LiveRequest
from octavo.frontend.placement import Placement
from octavo.frontend.readmission import TRIAL_TOKENS, Readmission
from octavo.frontend.replica import Replica
from octavo.frontend.router import Load
from octavo.params import SamplingParams
from octavo.simulation.backend import continuations
from octavo.simulation.costs import CostModel
from octavo.simulation.trace import Arrivals, Prompts, TraceRequest

from .autoscaling import PERIOD, Autoscaling
from .engine import SimulatedEngine
from .faults import PARTITION_SECONDS, SILENCE, SLOW_SECONDS, SLOWDOWN, Fault, Faults
from .record import Requests, Use

LOOK = 1.0  # seconds between looks at queues, drained engines and requests that time out while no engine is ready


class Event(IntEnum):
    """What happens at a time. Of two events at the same time, the lower one is first; arrivals come before all."""

    STEP = 1  # an engine's step, or stretch of steps, ends
    FAULT = 2
    NOTICED = 3  # the frontend counts a silent engine as lost
    HEALED = 4  # messages pass again
    SLOW_ENDED = 5
    STARTED = 6  # a new engine is ready
    LOOK = 7


@dataclass(slots=True, eq=False)
class CellReplica:
    """A replica, as far as placement needs one; see frontend.Replica.

    Attributes:
        engine: None while there is none.
        begun: time at which the current step began; None while the engine is idle.
        turn: number of the scheduled end of a step; others are outdated.
        added: time since which it costs money.
        is_reachable: whether messages pass between frontend and engine.
        delivered: output tokens of each request that had arrived when the engine became unreachable.
        faults: times and kinds of the faults to come, of which `fault` is the next one.
        comes_back: whether the engine is only cut off by a partition.
    """

    number: int
    load: Load
    cell: "Cell"
    added: float
    faults: Iterator[tuple[float, Fault]]
    readmission: Readmission = field(init=False)
    engine: SimulatedEngine | None = None
    begun: float | None = None
    turn: int = 0
    is_leaving: bool = False
    is_reachable: bool = False
    delivered: dict[str, int] = field(default_factory=dict)
    fault: Fault = Fault.KILL
    comes_back: bool = False

    def __post_init__(self) -> None:
        self.readmission = Readmission(lambda live: self.cell.send(self, live), self.cell.placement.place_waiting)

    @property
    def is_open(self) -> bool:
        return self.readmission.is_open and not self.is_leaving

    def send(self, message: Abort) -> None:
        """Take a message of the placement to the engine."""
        self.cell.abort(self, message.ids)


class Cell:
    """Serves a trace with one frontend and its engines.

    Args:
        config: settings of the engines, and of the frontend.
        pages: pages of each engine.
        number: number of the cell; each has its own faults.
        engines: number of engines at the start. They are loaded.
        start_seconds: from the decision to start an engine until it is ready.
        until: time after which no more requests arrive; by default all of the trace do.
    """

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        config: EngineConfig,
        costs: CostModel,
        pages: int,
        engines: int,
        start_seconds: float = 0.0,
        faults: Faults | None = None,
        autoscaling: Autoscaling | None = None,
        number: int = 0,
        until: float | None = None,
    ):
        self.now = 0.0
        self.placement = Placement(config.max_batch_tokens)
        self._config, self._costs, self._pages, self._number = config, costs, pages, number
        self._start_seconds, self._faults, self._autoscaling = start_seconds, faults or Faults({}), autoscaling
        self._arrivals, self._prompts, self._until = Arrivals(trace), Prompts(), math.inf if until is None else until
        self.requests = Requests(len(trace))
        self.use = Use(frontends=1, engines=engines, num_pages=pages)
        self._admission = Admission(config.max_batch_size * engines, config.max_queue, clock=lambda: self.now)
        self._events: list[tuple[float, int, int, int]] = []  # heap of (time, Event, replica, turn)
        self._all: list[CellReplica] = []  # by number, those that were drained too
        self._live: dict[str, LiveRequest] = {}  # by the engine's id
        self._num_live = 0
        self._ids = itertools.count()
        self._params: dict[int, SamplingParams] = {}  # by max_tokens
        self._queued, self._looks = 0.0, 0
        for _ in range(engines):
            self._started(self._add_replica())
        self._push(LOOK, Event.LOOK, -1)

    @property
    def replicas(self) -> list[CellReplica]:
        """Return the replicas that serve or are on their way."""
        return cast(list[CellReplica], self.placement.replicas)

    def run(self) -> tuple[Requests, Use]:
        """Serve the whole trace. Return what happened."""
        arrivals, events = self._arrivals, self._events
        while True:
            at = arrivals.next_at
            at = at if at is not None and at <= self._until else None
            if at is not None and (not events or at <= events[0][0]):
                self._move_to(at)
                self._arrive()
            elif self._num_live or at is not None:
                time, event, number, turn = heapq.heappop(events)
                self._handle(time, Event(event), number, turn)
            else:
                break
        for replica in self.replicas:
            self._count(replica)
        self.use.seconds = self.now
        return self.requests, self.use

    # Requests

    def _arrive(self) -> None:
        _, index = self._arrivals.pop()
        request = self._arrivals.trace[index]
        prompt = self._prompts.tokens(request)
        self.requests.arrived(index, request, len(prompt), self.now)
        try:
            self._admission.check(self._num_live, 1)
        except QueueFull:
            self.requests.ended(index, self.now, "the queue is full")
            self._arrivals.ended(index, self.now)
            return
        live = self._live_request(index, request, prompt)
        self._num_live += 1
        self._live[live.completions[0].request.id] = live
        self.placement.place(live)

    def _live_request(self, index: int, request: TraceRequest, prompt: list[int]) -> LiveRequest:
        """Return a live request without the parts that make text. Its id is its index in the trace."""
        params = self._params.get(request.output_tokens)
        if params is None:
            params = SamplingParams(temperature=0, max_tokens=request.output_tokens, ignore_eos=True, seed=0)
            self._params[request.output_tokens] = params
        nothing = cast(Any, None)
        message = EngineRequest(
            id=str(next(self._ids)),
            prompt=prompt,
            params=params,
            tenant=request.tenant,
            priority=request.priority,
            ttft_target=request.ttft_target,
            timeout=request.timeout,
        )
        return LiveRequest(
            id=str(index),
            prompt=None,
            prompt_token_ids=prompt,
            params=params,
            seed=0,
            tokenizer=nothing,
            sink=nothing,
            completions=[LiveCompletion(message, 0, nothing, nothing)],
            metrics=nothing,
            arrival=self.now,
            timeout=request.timeout or self._config.request_timeout,
        )

    def send(self, replica: CellReplica, live: LiveRequest) -> None:
        """Send a request to a replica's engine, as Frontend.replica_send does."""
        completion = live.completions[0]
        if live.was_sent:
            del self._live[completion.request.id]
            completion.request = msgspec.structs.replace(
                completion.request, id=str(next(self._ids)), output=completion.token_ids
            )
            self._live[completion.request.id] = live
        live.replica, live.was_sent = cast(Replica, replica), True
        replica.load.add(live, live.tokens_to_compute, 1)
        if not replica.is_reachable:
            return
        engine = replica.engine
        assert engine is not None
        if replica.begun is None:
            engine.wait_until(self.now)
            self._schedule(replica, self.now)
        elif engine.can_admit:
            self._interrupt(replica)
        engine.add(msgspec.structs.replace(completion.request, age=engine.clock() - live.arrival))
        if len(replica.load.unstarted) > 1:
            self._offer(replica.load)

    def abort(self, replica: CellReplica, ids: list[str]) -> None:
        """Abort requests in a replica's engine, whose current step goes on."""
        if replica.engine is not None and replica.is_reachable:
            self._interrupt(replica)
            replica.engine.settle()
            replica.engine.abort(ids)

    def _take(self, replica: CellReplica, output: TokenOutput) -> None:
        """Take over an output of an engine, as Frontend does."""
        live = self._live.get(output.id)
        if live is None or cast(CellReplica, live.replica) is not replica:
            self.use.late += 1
            return
        if output.token >= 0:
            self.requests.started(int(live.id), output.cached_tokens, self.now)
        if output.finish_reason:
            problem = None if output.finish_reason == "length" else output.message or output.finish_reason
            self._end(live, problem)
        elif live.progress < TRIAL_TOKENS:
            replica.load.started(live)
            replica.readmission.progressed(live)

    def _end(self, live: LiveRequest, problem: str | None) -> None:
        """Forget a request that has ended."""
        before, replica = self._num_live, cast(CellReplica | None, live.replica)
        del self._live[live.completions[0].request.id]
        self._num_live -= 1
        index = int(live.id)
        if problem is None:
            self.placement.router.ended(self._arrivals.trace[index].output_tokens)
        if replica is None:
            self.placement.waiting.pop(live, None)
        else:
            if live.sent:
                replica.load.remove(live, 1)
            replica.readmission.ended(live)
        self.requests.ended(index, self.now, problem)
        self._arrivals.ended(index, self.now)
        self._admission.left(1, before)

    # Events

    def _handle(self, time: float, event: Event, number: int, turn: int) -> None:
        replica = self._all[number] if number >= 0 else None
        if event is Event.STEP:
            assert replica is not None
            if turn == replica.turn and replica.begun is not None:
                self._move_to(time)
                self._step(replica)
            return
        self._move_to(time)
        if replica is None:
            self._look()
        elif event is Event.FAULT:
            self._fail(replica)
        elif event is Event.NOTICED:
            self._lose(replica, "no message")
        elif event is Event.HEALED:
            self._heal(replica)
        elif event is Event.SLOW_ENDED:
            self._slow_down(replica, 1.0)
        elif not replica.is_leaving:
            self._started(replica)

    def _step(self, replica: CellReplica) -> None:
        """End a step of an engine, and begin the next one."""
        engine, load = replica.engine, replica.load
        assert engine is not None
        outputs = engine.finish()
        self._note_use(replica)
        for output in outputs:
            self._take(replica, output)
        load.seconds_per_token = engine.scheduler.recovery.seconds_per_token or 0.0
        gained, lost = engine.kv.take_changes()
        if gained or lost:
            load.publish(load.number, b"".join(gained), b"".join(lost))
            self.use.page_changes += len(gained) + len(lost)
        if len(self.replicas) > 1:
            self._relieve(replica)
        engine.reports_all = not replica.readmission.is_open
        if engine.has_work:
            engine.begin()
            self._schedule(replica, engine.ends_at)
        else:
            replica.begun = None

    def _relieve(self, replica: CellReplica) -> None:
        completions = replica.load.completions
        self.placement.relieve_others(cast(Replica, replica))
        self.use.moves += replica.load.completions - completions

    def _offer(self, busiest: Load) -> None:
        """End the stretches of engines that would relieve a busy one, so that they do so after their current step."""
        work, router = self.placement.router.work(busiest), self.placement.router
        live = cast(LiveRequest, next(reversed(busiest.unstarted)))
        least = live.num_sequence_tokens + self._config.max_batch_tokens
        for replica in self.replicas:
            engine = replica.engine
            if engine is None or not engine.is_skipping or not replica.is_reachable or replica.load.unstarted:
                continue
            if work - router.work(replica.load) > least:
                self._interrupt(replica)

    def _interrupt(self, replica: CellReplica) -> None:
        """End an engine's stretch of steps with the current one."""
        if replica.engine is not None and replica.is_reachable and replica.engine.interrupt(self.now):
            replica.turn += 1
            heapq.heappush(self._events, (replica.engine.ends_at, Event.STEP, replica.number, replica.turn))

    def _schedule(self, replica: CellReplica, at: float) -> None:
        """Begin a step, which ends at `at`."""
        replica.begun = self.now
        replica.turn += 1
        heapq.heappush(self._events, (at, Event.STEP, replica.number, replica.turn))

    def _push(self, at: float, event: Event, number: int) -> None:
        heapq.heappush(self._events, (at, event, number, 0))

    def _move_to(self, time: float) -> None:
        assert time >= self.now, "time does not run backwards"
        self.now = time

    # Engines that come and go

    def _add_replica(self) -> CellReplica:
        number = len(self._all)
        faults = self._faults.of_engine(number, self._number)
        replica = CellReplica(number, self.placement.router.new_replica(), self, self.now, faults)
        self._all.append(replica)
        self.replicas.append(replica)
        self.use.most_engines = max(self.use.most_engines, len(self.replicas))
        self._next_fault(replica)
        return replica

    def _started(self, replica: CellReplica) -> None:
        """Begin to serve with a new engine."""
        replica.engine = engine = SimulatedEngine(self._config, self._costs, self._pages)
        engine.wait_until(self.now)
        self.placement.info = engine.info
        self.use.max_running = engine.scheduler.max_running
        replica.load.publish(0, b"", b"")
        replica.is_reachable = True
        replica.readmission.engine_ready()

    def _next_fault(self, replica: CellReplica) -> None:
        at, fault = next(replica.faults, (None, Fault.KILL))
        if at is not None:
            replica.fault = fault
            self._push(max(at, self.now), Event.FAULT, replica.number)

    def _fail(self, replica: CellReplica) -> None:
        """Let the next fault happen. An engine that is lost, being started or drained has none."""
        fault, engine = replica.fault, replica.engine
        self._next_fault(replica)
        if engine is None or not replica.is_reachable or replica.is_leaving:
            return
        self.use.faults[fault] += 1
        if fault is Fault.SLOW:
            self._slow_down(replica, SLOWDOWN)
            self._push(self.now + SLOW_SECONDS, Event.SLOW_ENDED, replica.number)
            return
        self._cut_off(replica, engine)
        if fault is Fault.KILL:
            self._lose(replica, "killed by SIGKILL")
        else:
            self._push(self.now + SILENCE, Event.NOTICED, replica.number)
        if fault is Fault.PARTITION:
            replica.comes_back = True
            self._push(self.now + PARTITION_SECONDS, Event.HEALED, replica.number)

    def _cut_off(self, replica: CellReplica, engine: SimulatedEngine) -> None:
        """Let no more messages pass. The tokens of the current step are lost."""
        last = {live.completions[0].request.id: live.params.max_tokens for live in self._lives_of(replica)}
        replica.delivered = {id: (tokens or 1) - 1 for id, tokens in last.items()}  # if it ends with this step
        replica.delivered.update(engine.delivered(self.now))
        replica.is_reachable, replica.begun = False, None

    def _lose(self, replica: CellReplica, reason: str) -> None:
        """Let the requests of a lost engine go on elsewhere, as Frontend.replica_lost does."""
        engine = replica.engine
        assert engine is not None
        lives = self._lives_of(replica)
        for live in lives:
            self._note_tokens(live, replica.delivered.get(live.completions[0].request.id, 0))
        replica.load.clear()
        exit = Exit(reason, is_fault=False, work=Work(prompts=engine.prompts or None))
        culprit, others = replica.readmission.engine_lost(lives, exit)
        self.use.resumed += len(others)
        self.placement.wait_first(others)
        if culprit is not None:
            self._end(culprit, "its engines were lost too often")
        self.placement.place_waiting()
        if not replica.comes_back:
            self._count_engine(engine)
            replica.engine = None
            self._push(self.now + self._start_seconds, Event.STARTED, replica.number)

    def _heal(self, replica: CellReplica) -> None:
        """Let an engine come back after a partition: without requests, with its cache."""
        engine = replica.engine
        assert engine is not None
        engine.wait_until(self.now)
        engine.abort(list(replica.delivered))
        self.use.late += len(engine.finish())
        engine.kv.take_changes()
        replica.load.publish(0, b"".join(engine.kv.watch(with_content=False)), b"")
        replica.is_reachable, replica.comes_back = True, False
        replica.readmission.engine_ready()

    def _slow_down(self, replica: CellReplica, factor: float) -> None:
        """Change the time of an engine's steps, beginning with the next one."""
        if replica.engine is not None:
            self._interrupt(replica)
            replica.engine.slowdown = factor

    def _lives_of(self, replica: CellReplica) -> list[LiveRequest]:
        return [live for live in self._live.values() if cast(CellReplica | None, live.replica) is replica]

    def _note_tokens(self, live: LiveRequest, count: int) -> None:
        """Note that at least `count` output tokens of a request have arrived."""
        completion = live.completions[0]
        if count > len(completion.token_ids):
            after = np.array(live.prompt_token_ids[-1:], np.int64)
            completion.token_ids = continuations(after, count)[0].tolist()

    # Autoscaling

    def _look(self) -> None:
        """Look at queues and drained engines, and decide how many engines there should be."""
        self._push(self.now + LOOK, Event.LOOK, -1)
        for live in self._live.values():
            assert live.replica is not None or live in self.placement.waiting, f"request {live.id} is forgotten"
        for live in [live for live in self.placement.waiting if live.timeout is not None]:
            if live.timeout is not None and self.now >= live.arrival + live.timeout:
                self._end(live, f"the request did not end within its timeout of {live.timeout:g} seconds")
        for replica in [replica for replica in self.replicas if replica.is_leaving]:
            self._drain(replica)
        if self._autoscaling is None:
            return
        self._looks += 1
        self._queued += sum(replica.load.queued_tokens for replica in self.replicas)
        if self._looks == round(PERIOD / LOOK):
            self._scale(self._autoscaling, self._queued / self._looks)
            self._looks, self._queued = 0, 0.0

    def _scale(self, autoscaling: Autoscaling, queued_tokens: float) -> None:
        """Start or drain engines."""
        staying = [replica for replica in self.replicas if not replica.is_leaving]
        wanted = autoscaling.decide(self.now, len(staying), queued_tokens)
        for _ in range(wanted - len(staying)):
            self.use.scale_outs += 1
            self._push(self.now + self._start_seconds, Event.STARTED, self._add_replica().number)
        open_ones = [replica for replica in staying if replica.is_open and replica.is_reachable]
        for replica in open_ones[: max(0, min(len(staying) - wanted, len(open_ones) - 1))]:
            self.use.scale_ins += 1
            replica.is_leaving = True
            self._drain(replica)
        self._admission.resize(self._config.max_batch_size * max(wanted, len(staying)))

    def _drain(self, replica: CellReplica) -> None:
        """Move a replica's requests to the other ones, then end it. Requests on trial stay; see Frontend.drain."""
        engine = replica.engine
        assert engine is not None
        if self.placement.has_open_replica:
            for live in self._lives_of(replica):
                if live.sent and not replica.readmission.is_on_trial(live):
                    self.abort(replica, [])
                    self._note_tokens(live, engine.arrived(live.completions[0].request.id))
                    self.placement.take_back(live)
                    self.use.resumed += 1
                    self.placement.place(live)
        if not self._lives_of(replica):
            self.replicas.remove(replica)
            self.placement.router.remove(replica.load)
            replica.turn += 1  # its current step has no more effect
            self._count(replica)

    # Counts

    def _note_use(self, replica: CellReplica) -> None:
        """Note what an engine has done since its current step began."""
        engine, use = replica.engine, self.use
        if engine is None or replica.begun is None:
            return
        seconds, pool, scheduler = self.now - replica.begun, engine.kv.pool, engine.scheduler
        pages, running, waiting = pool.num_pages - pool.num_available, len(scheduler.running), scheduler.num_waiting
        use.busy_seconds += seconds
        use.page_seconds += pages * seconds
        use.running_seconds += running * seconds
        use.waiting_seconds += waiting * seconds
        use.peak_pages = max(use.peak_pages, pages)
        use.peak_running, use.peak_waiting = max(use.peak_running, running), max(use.peak_waiting, waiting)

    def _count(self, replica: CellReplica) -> None:
        """Count what a replica did and cost, at its end."""
        self.use.engine_seconds += self.now - replica.added
        if replica.engine is not None:
            self._count_engine(replica.engine)

    def _count_engine(self, engine: SimulatedEngine) -> None:
        self.use.steps += engine.num_steps
        self.use.tokens_computed += engine.tokens_computed
        self.use.preemptions += engine.scheduler.preemptions
