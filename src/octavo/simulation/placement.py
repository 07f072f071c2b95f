"""Placement of requests on simulated replicas, as frontend.Frontend places them on real ones."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import msgspec

from octavo.engine.engine import Engine
from octavo.engine.messages import EngineRequest, TokenOutput
from octavo.frontend.router import Load, Router
from octavo.kv import page_keys, root_key

EXACT, ROUND_ROBIN, LEAST_LOADED = "exact", "round-robin", "least-loaded"


class RoundRobin(Router):
    """Sends requests to the replicas in turn. For comparison only."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = count()

    def choose(
        self, loads: Sequence[Load], length: int, keys: Iterable[bytes], page_size: int
    ) -> tuple[int, list[int]]:
        best = next(self._turn) % len(loads)
        return best, self.cached_pages(loads, length, keys, page_size)

    def work(self, load: Load) -> float:
        return 0.0  # so that no request is moved


class LeastLoaded(RoundRobin):
    """Sends each request to a replica with the fewest unfinished ones, in turn among equals. For comparison only."""

    def choose(
        self, loads: Sequence[Load], length: int, keys: Iterable[bytes], page_size: int
    ) -> tuple[int, list[int]]:
        best = min(range(len(loads)), key=lambda i: (loads[i].completions, loads[i].recent))
        loads[best].recent = next(self._turn)
        return best, self.cached_pages(loads, length, keys, page_size)


ROUTINGS: dict[str, Callable[[], Router]] = {EXACT: Router, ROUND_ROBIN: RoundRobin, LEAST_LOADED: LeastLoaded}


@dataclass(slots=True, eq=False)
class Replica:
    """An engine of a replay, and what the router knows about it.

    Args:
        wait: Waits for a number of seconds on the engine's clock.

    Attributes:
        outputs: The outputs of the current step, which ends at `now`.
    """

    engine: Engine
    wait: Callable[[float], None]
    load: Load = field(init=False)
    outputs: list[TokenOutput] = field(default_factory=list)
    started_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.started_at = self.engine.clock()
        self.engine.kv.watch(with_content=False)

    @property
    def now(self) -> float:
        """Return the seconds since the start of the replay on the engine's clock."""
        return self.engine.clock() - self.started_at

    @property
    def is_busy(self) -> bool:
        return bool(self.outputs) or self.engine.has_work


@dataclass(slots=True, eq=False)
class Live:
    """A request that has not ended.

    Attributes:
        request: The message with which an engine serves it.
        arrival: Seconds from the start of the replay.
        tokens: Number of its output tokens so far.
    """

    request: EngineRequest
    arrival: float
    replica: Replica | None = None
    tokens: int = 0


class Placement:
    """Places requests, and keeps the router informed.

    Args:
        max_batch_tokens: That of each engine.

    Attributes:
        moves: Number of requests that were moved to another replica.
    """

    def __init__(self, replicas: Sequence[Replica], routing: str, max_batch_tokens: int):
        self.replicas, self.moves = replicas, 0
        self._router = ROUTINGS[routing]()
        for replica in replicas:
            replica.load = self._router.new_replica()
        self._max_batch_tokens = max_batch_tokens
        self._live: dict[str, Live] = {}
        self._page_size = replicas[0].engine.kv.page_size

    def place(self, live: Live) -> None:
        """Send a request to the replica that the router chooses."""
        request, best, cached = live.request, 0, 0
        self._live[request.id] = live
        if len(self.replicas) > 1:
            root = root_key(self.replicas[0].engine.fingerprint, request.tenant, request.salt)
            loads, keys = [replica.load for replica in self.replicas], page_keys(root, request.prompt, self._page_size)
            best, pages = self._router.choose(loads, len(request.prompt), keys, self._page_size)
            cached = pages[best] * self._page_size
        self._send(live, self.replicas[best], len(request.prompt) - cached, live.arrival)

    def step_ended(self, replica: Replica) -> list[TokenOutput]:
        """Take over the results of a replica's step. Return the outputs of requests that are still there."""
        load, outputs = replica.load, []
        for output in replica.outputs:
            live = self._live.get(output.id)
            if live is None or live.replica is not replica:
                continue  # it continues elsewhere
            outputs.append(output)
            load.started(live)
            live.tokens += output.token >= 0
            if output.finish_reason:
                load.remove(live, 1)
                del self._live[output.id]
                self._router.ended(live.tokens)
        replica.outputs = []
        load.seconds_per_token = replica.engine.scheduler.recovery.seconds_per_token or 0.0
        gained, lost = replica.engine.kv.take_changes()
        load.publish(load.number, b"".join(gained), b"".join(lost))
        self._relieve_others(replica)
        return outputs

    def _send(self, live: Live, replica: Replica, tokens: int, now: float) -> None:
        """Send a request to a replica, `tokens` of which are to be computed there."""
        if not replica.is_busy:
            replica.wait(max(0.0, now - replica.now))
        live.replica = replica
        replica.load.add(live, tokens, 1)
        replica.engine.add(msgspec.structs.replace(live.request, age=replica.now - live.arrival))

    def _relieve_others(self, replica: Replica) -> None:
        """Move a request here that another replica would begin later than in its next step, if that is sooner here."""
        busiest = max((other.load for other in self.replicas), key=lambda load: load.queued_tokens)
        if replica.load.unstarted or len(busiest.unstarted) < 2:
            return
        live = next(reversed(busiest.unstarted))
        assert isinstance(live, Live) and live.replica is not None
        length = len(live.request.prompt)
        if self._router.work(busiest) - self._router.work(replica.load) > length + self._max_batch_tokens:
            live.replica.engine.abort([live.request.id])
            busiest.remove(live, 1)
            self._send(live, replica, length, replica.now)
            self.moves += 1
