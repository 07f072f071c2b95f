"""Router: choose the replica that can finish a request soonest."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from octavo.kv.prefix import KEY_BYTES

USUAL_OUTPUT = 128.0  # expected tokens per completion, as long as none has ended
SMOOTHING = 0.02  # weight of the latest completion in the mean length of outputs
BALANCE = 0.7  # tokens of cost for a token of excess; see Router
MEMORY = 256  # requests per replica; see Router
SIMILAR = 1.9  # ratio of measured speeds up to which they count as equal: the more load, the lower is the measured one


@dataclass(eq=False, slots=True)
class Load:
    """What the router knows about one replica.

    Args:
        holders: for the key of each page in any replica's cache, the sum of the `bit` of these replicas. All replicas
            of a router have the same dict.
        bit: a power of two that identifies the replica in `holders`.

    Attributes:
        pages: keys of the pages in the engine's cache, which the engine publishes.
        unstarted: requests that were sent and have no token yet, with the number of their tokens to compute, in the
            order in which they were sent.
        queued_tokens: the sum of `unstarted`.
        completions: unfinished completions.
        number: number of the next message about pages.
        seconds_per_token: measured time to compute a token of a prompt; 0 if unknown.
        seconds_per_fetched_token: expected time to fetch the pages of a token from another engine.
        slowness: this time over that of the fastest replica; 1 if they are similar.
        recent: recent work (see Router), in tokens of the fastest replica.
        address: where the engine serves its pages to other engines; "" if it does not.
        role: that of the engine, one of config.ROLES.
    """

    holders: dict[bytes, int]
    bit: int
    pages: set[bytes] = field(default_factory=set, init=False)
    unstarted: dict[Hashable, int] = field(default_factory=dict)
    queued_tokens: int = 0
    completions: int = 0
    number: int = 0
    seconds_per_token: float = 0.0
    seconds_per_fetched_token: float = 0.0
    slowness: float = 1.0
    recent: float = 0.0
    address: str = ""
    role: str = "both"

    def add(self, request: Hashable, tokens: int, completions: int) -> None:
        """Count a request that was sent, with `tokens` to compute."""
        self.unstarted[request] = tokens
        self.queued_tokens += tokens
        self.completions += completions

    def started(self, request: Hashable) -> None:
        """Note that a request has a token of this replica."""
        self.queued_tokens -= self.unstarted.pop(request, 0)

    def remove(self, request: Hashable, completions: int) -> None:
        """Subtract a request that has ended, or continues elsewhere, with `completions` unfinished completions."""
        self.started(request)
        self.completions -= completions

    def clear(self) -> None:
        """Note that the engine has ended: it has neither requests nor pages."""
        self._lose(self.pages)
        self.pages, self.unstarted, self.address = set(), {}, ""
        self.queued_tokens = self.completions = self.number = 0

    def publish(self, number: int, gained: bytes, lost: bytes) -> bool:
        """Take over a message about pages; see Pages. Return False if a message before it is missing."""
        if number not in (0, self.number):
            return False
        if number == 0:
            self._lose(self.pages)
            self.pages.clear()
        for key in _keys(gained):
            self.holders[key] = self.holders.get(key, 0) | self.bit
            self.pages.add(key)
        lost_keys = self.pages.intersection(_keys(lost))
        self._lose(lost_keys)
        self.pages -= lost_keys
        self.number = number + 1
        return True

    def _lose(self, keys: set[bytes]) -> None:
        for key in keys:
            self.holders[key] ^= self.bit
            if not self.holders[key]:
                del self.holders[key]


class Router:
    """Sends each request where its cost is least:

        cost = (tokens to compute + queued tokens) / speed + decode load + min(BALANCE * excess, prompt / speed)
        decode load = unfinished completions * mean length of outputs / speed
        excess = max(0, recent work - mean recent work of the replicas)

    Tokens to compute are those whose pages the replica's engine does not have. So a long cached prefix outweighs a
    little more load, and much more load outweighs the prefix.

    The excess keeps the load even while there are no queues. Without it, every conversation with a popular system
    prompt would go to the replica that computed this prompt first. With it, a replica that has had more than its share
    loses new conversations to other replicas, which then compute the system prompt too. A conversation with a long
    history, which is expensive to compute elsewhere, stays.

    The recent work of a replica is the time to compute the uncached tokens of the requests that were sent there, and
    outputs of the mean length. The weight of a request falls to 1 / e while each replica gets MEMORY more.
    """

    def __init__(self) -> None:
        self.mean_output = USUAL_OUTPUT
        self._choices = 0
        self._holders: dict[bytes, int] = {}
        self._loads: dict[int, Load] = {}  # all replicas by their bits

    def new_replica(self) -> Load:
        """Return the load of a new replica. It has no pages, and begins with the mean of the recent work."""
        used = sum(self._loads)
        bit = ~used & (used + 1)  # the lowest one that is free
        mean = sum(load.recent for load in self._loads.values()) / max(1, len(self._loads))
        self._loads[bit] = Load(self._holders, bit, recent=mean)
        return self._loads[bit]

    def remove(self, load: Load) -> None:
        """Forget a replica."""
        load.clear()
        if self._loads.get(load.bit) is load:
            del self._loads[load.bit]

    def choose(
        self, loads: Sequence[Load], length: int, keys: Iterable[bytes], page_size: int
    ) -> tuple[int, list[int]]:
        """Return the index of the best of `loads` for a prompt, and what `cached_pages` returns for them.

        Args:
            length: tokens of the prompt.
            keys: the keys of its full pages; see `page_keys`.
        """
        if self._choices % len(loads) == 0:
            self._fade()
            _compare_speeds(loads)
        self._choices += 1
        pages = self.cached_pages(loads, length, keys, page_size)
        best = self._best(loads, length, pages, page_size)
        loads[best].recent += (length - pages[best] * page_size + self.mean_output) * loads[best].slowness
        return best, pages

    def _best(self, loads: Sequence[Load], length: int, pages: list[int], page_size: int) -> int:
        """Return the index of the replica with the least cost; of equal ones, that with the least recent work.

        The unit of cost is the time in which the fastest replica computes a token.

        Args:
            length: tokens of the prompt.
            pages: the number of its pages that each replica has.
        """
        mean_output = self.mean_output
        costs = [
            (length - count * page_size + load.queued_tokens + load.completions * mean_output) * load.slowness
            for load, count in zip(loads, pages, strict=True)
        ]
        recent = [load.recent for load in loads]
        mean = sum(recent) / len(recent)
        for i, work in enumerate(recent):
            if work > mean:
                costs[i] += min(BALANCE * (work - mean), length * loads[i].slowness)
        least = min(costs)
        if costs.count(least) == 1:
            return costs.index(least)
        return min((i for i, cost in enumerate(costs) if cost == least), key=recent.__getitem__)

    def cached_pages(self, loads: Sequence[Load], length: int, keys: Iterable[bytes], page_size: int) -> list[int]:
        """Return, for each replica, how many of the prompt's first pages its engine has. The last token never counts.

        The time grows with the pages that any replica has, and with the number of replicas, not with their product.
        """
        index = {load.bit: i for i, load in enumerate(loads)}
        everyone = holders = sum(index)  # those that have all pages so far
        most = (length - 1) // page_size
        pages = [most] * len(loads)
        holders_of = self._holders.get
        for page, key in zip(range(most), keys, strict=False):
            still = holders & holders_of(key, 0)
            if still == holders:
                continue
            if not still and holders == everyone:
                return [page] * len(loads)
            lost, holders = holders ^ still, still
            while lost:
                bit = lost & -lost
                pages[index[bit]] = page
                lost ^= bit
            if not holders:
                break
        return pages

    def _fade(self) -> None:
        """Reduce the weight of recent work; called once per round of choices."""
        for load in self._loads.values():
            load.recent *= 1 - 1 / MEMORY

    def work(self, load: Load) -> float:
        """Return the tokens that a replica is expected to compute before it is idle."""
        return load.queued_tokens + load.completions * self.mean_output

    def ended(self, output_tokens: int) -> None:
        """Note the length of a completion that has ended."""
        self.mean_output += SMOOTHING * (output_tokens - self.mean_output)


def _compare_speeds(loads: Sequence[Load]) -> None:
    """Set `slowness`. Replicas of unknown or similar speed count as equal to the fastest."""
    fastest = min((load.seconds_per_token for load in loads if load.seconds_per_token), default=1.0)
    for load in loads:
        ratio = load.seconds_per_token / fastest
        load.slowness = ratio if ratio > SIMILAR else 1.0


def _keys(concatenated: bytes) -> Iterator[bytes]:
    return (concatenated[at : at + KEY_BYTES] for at in range(0, len(concatenated), KEY_BYTES))
