"""`fair`: tenants share the engine in proportion to their weights, measured in tokens served.

The virtual token counter of Sheng et al. (Fairness in Serving Large Language Models, OSDI 2024): each tenant has a
counter of the service it has received, divided by its weight. The waiting tenant with the least counter is served next;
its own requests are served in order of arrival. docs/scheduling.md explains the design, and proves that every request
is served in the end.
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

# The cost of a prompt token that has to be computed, and of an output token (the first one comes with the prompt). An
# output token takes 2 to 5 times the time of a prompt token, in steps of 64 and of 8 rows (docs/performance.md).
PROMPT_TOKEN, OUTPUT_TOKEN = 1.0, 4.0
REMEMBERED = 10_000  # tenants without waiting requests whose counters are kept; more than can run at a time

_tenant = attrgetter("tenant")
_Entry = tuple[float, int, "_Account"]  # counter, order of the account's first sequence


@dataclass(slots=True, eq=False)
class _Account:
    """A tenant's account.

    Attributes:
        counter: the cost of the service it has received, divided by its weight.
        queue: its waiting sequences.
        entry: its valid entry in the heap of accounts with waiting sequences; its other entries there are outdated.
    """

    tenant: str
    weight: float
    counter: float
    queue: WaitingQueue = field(default_factory=WaitingQueue)
    entry: _Entry | None = None

    def enter(self) -> _Entry:
        """Return a new valid entry."""
        first = self.queue.first()
        assert first is not None
        self.entry = (self.counter, first.order, self)
        return self.entry


class Fair(Policy):
    """Weighted fair shares of tokens between tenants.

    - A prompt is charged at its first admission, for the tokens that are not in the cache, and not again after a
      preemption. Output is charged as it is generated.
    - When a tenant begins to wait, its counter is raised above the *floor*: the counter of the tenant served last,
      before the charge for that service. So time without requests earns no credit. (Sheng et al. raise it to the least
      counter of the waiting tenants. The floor is not above that counter and needs no search, and the tenant goes
      before one that has just been served. Start-time fair queueing calls the floor virtual time.)
    - If a waiting tenant has less than half of its share of the running sequences, or all its requests fit into its
      share, and its share is at least one, the latest sequence of the tenant furthest above its share is preempted.
    """

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self._weights = config.tenant_weights
        self._waiting: dict[str, _Account] = {}
        self._others: OrderedDict[str, _Account] = (
            OrderedDict()
        )  # accounts without waiting sequences; the next to forget comes first
        self._waiting_weight = 0.0  # of all tenants that wait
        self._heap: list[_Entry] = []
        self._floor = 0.0

    def key(self, seq: Sequence) -> tuple[float, int]:
        return self._account(seq.tenant).counter, seq.order

    def add(self, seq: Sequence) -> None:
        account = self._account(seq.tenant)
        if not seq.admitted:
            weight = seq.request.weight
            self._change_weight(account, self._weights.get(seq.tenant, 1.0) if weight is None else weight)
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
            elif account.counter > counter:  # the tenant was served in the meantime: move it back
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
        if account := self._waiting.get(seq.tenant):
            account.queue.remove(seq)
            self._leave_if_empty(account)

    def charge(self, decoding: Iterable[Sequence]) -> None:
        for tenant, num_sequences in Counter(map(_tenant, decoding)).items():
            account = self._account(tenant)
            account.counter += OUTPUT_TOKEN * num_sequences / account.weight

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return max(islice(running, 1, None), key=self.key, default=next(iter(running)))

    def preempt_for(self, waiting: Sequence, running: Collection[Sequence]) -> Sequence | None:
        counts = Counter(map(_tenant, running))  # running sequences by tenant
        accounts = {tenant: self._account(tenant) for tenant in (*counts, waiting.tenant)}
        weight = sum(account.weight for account in accounts.values() if account.entry is None)
        unit = len(running) / (weight + self._waiting_weight)  # running sequences per unit of weight
        share = unit * accounts[waiting.tenant].weight
        has, wants = counts[waiting.tenant], len(accounts[waiting.tenant].queue)
        if share < 1 or (2 * has >= share and has + wants > share):
            return None
        most = max(accounts.values(), key=lambda account: counts[account.tenant] / account.weight)
        if counts[most.tenant] <= max(1, unit * most.weight):
            return None
        victims = (seq for seq in islice(running, 1, None) if seq.tenant == most.tenant)
        return max(victims, key=attrgetter("order"))

    def _change_weight(self, account: _Account, weight: float) -> None:
        """Change a tenant's share from now on. Its counter stays: what it has received is charged already."""
        if account.entry is not None:
            self._waiting_weight += weight - account.weight
        account.weight = weight

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
