"""`fair`: tenants share the engine by the tokens they get, in proportion to their weights.

Each tenant has a counter of what it was served. The waiting tenant with the least counter is served next, first come
first served within it: the virtual token counter (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024).
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter

from octavo.config import EngineConfig, parse_weights

from .policies import Policy, WaitingQueue
from .sequence import Sequence

# A token of the prompt that has to be computed costs 1; each further one that comes out costs 4. In time an output token
# costs 2 to 5 times as much, as it comes in a step of 64 or of 8 rows (docs/performance.md): only a prompt's tokens can
# fill a step.
PROMPT_TOKEN, OUTPUT_TOKEN = 1.0, 4.0
REMEMBERED = 1000  # tenants without a waiting request whose counters are kept

_tenant = attrgetter("tenant")


@dataclass(slots=True)
class _Account:
    weight: float
    counter: float  # cost of the tokens served, over the weight
    queue: WaitingQueue = field(default_factory=WaitingQueue)
    entry: tuple[float, int, str] | None = None  # in the heap; any other there is out of date

    def enter(self, name: str) -> tuple[float, int, str]:
        """Its new entry for the heap."""
        first = self.queue.first()
        assert first is not None
        self.entry = (self.counter, first.order, name)
        return self.entry


class Fair(Policy):
    """Weighted fair shares of tokens between tenants.

    - A prompt is charged as it is admitted, but not what the cache had of it, nor its recomputing after a preemption.
      Output is charged as it comes.
    - A tenant that comes back after a time without waiting requests has saved nothing up: its counter is lifted above
      the *floor*, the counter of the tenant that was served last, as that was before it was served. (Sheng et al.
      lift it to the least counter of those that wait. The floor is never above that, so a returning tenant goes before
      one that has just been served; and it is known without a search. Start-time fair queueing calls it virtual time.)
    - A tenant of which nothing runs, though its share of the batch is a sequence or more, need not wait until another's
      long requests end: the tenant that is furthest above its own share gives up its latest sequence.

    Why everybody is served: the sequence that was admitted the earliest is never a victim, so it advances and ends, and
    slots and pages come free again and again. They are offered to the least counter. A counter rises only by what its tenant
    is served, and tenants that begin to wait start above the floor, which rises by an output token at least each
    time that all those were served that waited at it: so a given counter is reached, even if new tenants come for ever.
    Nothing is charged for recomputing: one who lost its pages is ahead of newcomers until it is where it was. And whoever makes
    way has more than its share, one or more, and so more than one sequence; the other has none: it cannot go back and forth.
    """

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self._weights = parse_weights(config.tenant_weights or "")
        self._waiting: dict[str, _Account] = {}
        self._waiting_weight = 0.0  # of all in there
        self._others: OrderedDict[str, _Account] = OrderedDict()  # nothing of theirs waits; the first to be forgotten first
        self._order: list[tuple[float, int, str]] = []  # heap: counter, order of its first, tenant; some are out of date
        self._floor = 0.0

    def key(self, seq: Sequence) -> tuple[float, int]:
        return self._account(seq.tenant).counter, seq.order

    def add(self, seq: Sequence) -> None:
        name = seq.tenant
        account = self._account(name)
        account.queue.add(seq)
        if name not in self._waiting:
            del self._others[name]
            self._waiting[name] = account
            self._waiting_weight += account.weight
            if not seq.admitted:
                account.counter = max(account.counter, self._floor + OUTPUT_TOKEN)
            if len(self._order) > 2 * len(self._waiting) + 16:
                self._order = [entry for entry in self._order if self._is_valid(entry)]
                heapq.heapify(self._order)
            heapq.heappush(self._order, account.enter(name))

    def peek(self) -> Sequence | None:
        while self._order:
            entry = self._order[0]
            account = self._waiting.get(entry[2])
            if account is None or account.entry is not entry:
                heapq.heappop(self._order)
            elif account.counter > entry[0]:  # it was served meanwhile: further back
                heapq.heapreplace(self._order, account.enter(entry[2]))
            else:
                return account.queue.first()
        return None

    def pop(self) -> None:
        name = self._order[0][2]
        account = self._waiting[name]
        seq = account.queue.first()
        assert seq is not None
        account.queue.pop()
        self._floor = max(self._floor, account.counter)
        if not seq.admitted:
            account.counter += PROMPT_TOKEN * seq.num_uncomputed / account.weight
        self._leave_if_empty(name)

    def remove(self, seq: Sequence) -> None:
        self._waiting[seq.tenant].queue.forget()
        self._leave_if_empty(seq.tenant)

    def charge(self, decoding: Sequences[Sequence]) -> None:
        for name, sequences in Counter(map(_tenant, decoding)).items():
            account = self._account(name)
            account.counter += OUTPUT_TOKEN * sequences / account.weight

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return max(islice(running, 1, None), key=self.key, default=next(iter(running)))

    def makes_way(self, running: Collection[Sequence]) -> Sequence | None:
        first = self.peek()
        sequences = Counter(map(_tenant, running))
        if first is None or first.tenant in sequences:
            return None
        weights = {name: self._account(name).weight for name in sequences}
        weight = self._waiting_weight + sum(weights[name] for name in sequences.keys() - self._waiting.keys())
        share = len(running) / weight  # for a weight of 1
        above = max(sequences, key=lambda name: sequences[name] / weights[name])
        if share * self._waiting[first.tenant].weight < 1 or sequences[above] <= max(1, share * weights[above]):
            return None
        theirs = (seq for seq in islice(running, 1, None) if seq.tenant == above)
        return max(theirs, key=attrgetter("order"))

    def _account(self, name: str) -> _Account:
        account = self._waiting.get(name) or self._others.get(name)
        if account is None:
            account = self._others[name] = _Account(self._weights.get(name, 1.0), self._floor)
            if len(self._others) > REMEMBERED:
                self._others.popitem(last=False)
        return account

    def _leave_if_empty(self, name: str) -> None:
        if self._waiting[name].queue:
            return
        account = self._others[name] = self._waiting.pop(name)
        account.entry = None
        self._waiting_weight = self._waiting_weight - account.weight if self._waiting else 0.0
        if len(self._others) > REMEMBERED:
            self._others.popitem(last=False)
