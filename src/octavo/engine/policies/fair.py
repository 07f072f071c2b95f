"""`fair`: tenants share the engine by the tokens they get, in proportion to their weights.

Each tenant has a counter of what it was served. The waiting tenant with the least counter is served next, first come
first served within it: the virtual token counter (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024).
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter

from octavo.config import EngineConfig
from octavo.engine.sequence import Sequence

from .policy import Policy, WaitingQueue

# Of a prompt, a token that has to be computed costs 1; of the output, one costs 4 (the first comes with the prompt). In
# time it is 2 to 5 times as much, in steps of 64 and of 8 rows (docs/performance.md): output comes a token per step.
PROMPT_TOKEN, OUTPUT_TOKEN = 1.0, 4.0
REMEMBERED = 10_000  # tenants whose counters are kept though nothing of theirs waits: more than can run

_tenant = attrgetter("tenant")
_Entry = tuple[float, int, "_Account"]  # counter, order of its first sequence


@dataclass(slots=True, eq=False)
class _Account:
    """A tenant's. `counter`: the cost of what it was served, over its weight."""

    tenant: str
    weight: float
    counter: float
    queue: WaitingQueue = field(default_factory=WaitingQueue)
    entry: _Entry | None = None  # in the heap of those with something in the queue; others of its there are out of date

    def enter(self) -> _Entry:
        """Its new entry."""
        first = self.queue.first()
        assert first is not None
        self.entry = (self.counter, first.order, self)
        return self.entry


class Fair(Policy):
    """Weighted fair shares of tokens between tenants.

    - A prompt is charged when it is admitted: what the cache does not have of it, and once, even if it is preempted.
      Output is charged as it comes.
    - A tenant that comes back when nothing of its waited has saved nothing up: its counter is lifted above the *floor*,
      which is the counter of the tenant that was served last, before it was charged for that. (Sheng et al. lift it to
      the least counter of those that wait. The floor is not above that, and known without a search; and a tenant that
      comes back goes before one that has just been served. Start-time fair queueing calls it virtual time.)
    - A tenant that has less than half of its share of the batch, if that is a sequence or more, need not wait for the
      end of others' long requests: the tenant that is the furthest above its own share gives up its latest sequence.

    Why everybody is served: the sequence that was admitted first of those that run is never a victim while others run,
    so it advances and ends. So slots and pages come free again and again, and are offered to the least counter. A
    counter rises only with what its tenant is served, and whoever begins to wait starts above the floor, which rises
    by an output token at least when all are served that were at it. So it reaches every counter, even if new tenants
    come for ever. Recomputing is not charged: after a preemption one is ahead of newcomers until one is where one was.
    And who makes way keeps half its share at least, so that the place cannot go back and forth.
    """

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self._weights = config.tenant_weights
        self._waiting: dict[str, _Account] = {}
        self._others: OrderedDict[str, _Account] = OrderedDict()  # nothing of theirs waits; first to be forgotten first
        self._waiting_weight = 0.0  # of all that wait
        self._heap: list[_Entry] = []
        self._floor = 0.0

    def key(self, seq: Sequence) -> tuple[float, int]:
        return self._account(seq.tenant).counter, seq.order

    def add(self, seq: Sequence) -> None:
        account = self._account(seq.tenant)
        account.queue.add(seq)
        if account.entry is not None:
            return
        if not seq.admitted:
            account.counter = max(account.counter, self._floor + OUTPUT_TOKEN)
        self._waiting[seq.tenant] = self._others.pop(seq.tenant)
        self._waiting_weight += account.weight
        if len(self._heap) > 2 * len(self._waiting) + 16:
            self._heap = [entry for entry in self._heap if entry[2].entry is entry]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, account.enter())

    def peek(self) -> Sequence | None:
        while self._heap:
            entry = self._heap[0]
            counter, _, account = entry
            if account.entry is not entry:
                heapq.heappop(self._heap)
            elif account.counter > counter:  # it was served meanwhile: further back
                heapq.heapreplace(self._heap, account.enter())
            else:
                return account.queue.first()
        return None

    def pop(self) -> None:
        account = self._heap[0][2]
        seq = account.queue.first()
        assert seq is not None
        account.queue.pop()
        self._floor = max(self._floor, account.counter)
        if not seq.admitted:
            account.counter += PROMPT_TOKEN * seq.num_uncomputed / account.weight
        self._leave_if_empty(account)

    def remove(self, seq: Sequence) -> None:
        account = self._waiting[seq.tenant]
        account.queue.forget()
        self._leave_if_empty(account)

    def charge(self, decoding: Iterable[Sequence]) -> None:
        for tenant, num_sequences in Counter(map(_tenant, decoding)).items():
            account = self._account(tenant)
            account.counter += OUTPUT_TOKEN * num_sequences / account.weight

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return max(islice(running, 1, None), key=self.key, default=next(iter(running)))

    def makes_way(self, waiting: Sequence, running: Collection[Sequence]) -> Sequence | None:
        sequences = Counter(map(_tenant, running))  # of each tenant
        accounts = {tenant: self._account(tenant) for tenant in (*sequences, waiting.tenant)}
        weight = sum(account.weight for account in accounts.values() if account.entry is None)
        share = len(running) / (weight + self._waiting_weight)  # of a weight of 1
        theirs = share * accounts[waiting.tenant].weight
        if theirs < 1 or 2 * sequences[waiting.tenant] >= theirs:
            return None
        most = max(accounts.values(), key=lambda account: sequences[account.tenant] / account.weight)
        if sequences[most.tenant] <= max(1, share * most.weight):
            return None
        victims = (seq for seq in islice(running, 1, None) if seq.tenant == most.tenant)
        return max(victims, key=attrgetter("order"))

    def _account(self, tenant: str) -> _Account:
        account = self._waiting.get(tenant) or self._others.get(tenant)
        if account is None:
            account = _Account(tenant, self._weights.get(tenant, 1.0), self._floor)
            self._remember(account)
        return account

    def _leave_if_empty(self, account: _Account) -> None:
        if not account.queue:
            account.entry = None
            del self._waiting[account.tenant]
            self._waiting_weight = self._waiting_weight - account.weight if self._waiting else 0.0
            self._remember(account)

    def _remember(self, account: _Account) -> None:
        self._others[account.tenant] = account
        if len(self._others) > REMEMBERED:
            self._others.popitem(last=False)
