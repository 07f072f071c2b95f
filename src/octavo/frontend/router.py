"""Router: choose the replica that can finish a request soonest."""

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from octavo.kv import Prefix
from octavo.kv.prefix import KEY_BYTES

USUAL_OUTPUT = 128.0  # expected tokens per completion, as long as none has ended
SMOOTHING = 0.02  # weight of the latest completion in the mean length of outputs
BALANCE = 0.7  # tokens of cost for a token of excess; see Router
MEMORY = 256  # requests per replica; see Router
SIMILAR = 1.9  # ratio of measured speeds up to which they count as equal: the more load, the lower is the measured one


@dataclass(eq=False, slots=True)
class Load:
    """What the router knows about one replica.

    Attributes:
        pages: keys of the pages in the engine's cache, which the engine publishes.
        unstarted: requests that were sent and have no token yet, with the number of their tokens to compute, in the
            order in which they were sent.
        queued_tokens: the sum of `unstarted`.
        completions: unfinished completions.
        number: number of the next message about pages.
        seconds_per_token: measured time to compute a token of a prompt; 0 if unknown.
        recent: recent work in tokens (see Router); negative until the router has considered this replica.
    """

    pages: set[bytes] = field(default_factory=set)
    unstarted: dict[Hashable, int] = field(default_factory=dict)
    queued_tokens: int = 0
    completions: int = 0
    number: int = 0
    seconds_per_token: float = 0.0
    recent: float = -1.0

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
        self.pages, self.unstarted = set(), {}
        self.queued_tokens = self.completions = self.number = 0

    def publish(self, number: int, gained: bytes, lost: bytes) -> bool:
        """Take over a message about pages; see Pages. Return False if a message before it is missing."""
        if number not in (0, self.number):
            return False
        if number == 0:
            self.pages.clear()
        self.pages.update(_keys(gained))
        self.pages.difference_update(_keys(lost))
        self.number = number + 1
        return True


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

    def choose(self, loads: Sequence[Load], prefix: Prefix, page_size: int) -> tuple[int, int]:
        """Return the index of the best of `loads` for a prompt, and the number of its tokens that are cached there."""
        if self._choices % len(loads) == 0 or min([load.recent for load in loads]) < 0:
            _fade(loads)
        self._choices += 1
        length, slower = len(prefix.tokens), _slower(loads)
        pages, keys = _most_cached_pages(loads, prefix, page_size)
        best = self._best(loads, length, pages, page_size, slower)
        if not loads[best].pages.issuperset(keys[: pages[best]]):  # fewer are cached, so another may be better
            pages = cached_pages(loads, prefix, page_size)
            best = self._best(loads, length, pages, page_size, slower)
        cached = pages[best] * page_size
        loads[best].recent += (length - cached + self.mean_output) * slower.get(best, 1.0)
        return best, cached

    def _best(
        self, loads: Sequence[Load], length: int, pages: list[int], page_size: int, slower: dict[int, float]
    ) -> int:
        """Return the index of the replica with the least cost; of equal ones, that with the least recent work.

        Args:
            length: tokens of the prompt.
            pages: the number of its pages that each replica has.
            slower: see `_slower`. The unit of time is that in which the fastest replica computes a token.
        """
        mean_output = self.mean_output
        costs = [
            length - count * page_size + load.queued_tokens + load.completions * mean_output
            for load, count in zip(loads, pages, strict=True)
        ]
        for i, factor in slower.items():
            costs[i] *= factor
        recent = [load.recent for load in loads]
        mean = sum(recent) / len(recent)
        for i, work in enumerate(recent):
            if work > mean:
                costs[i] += min(BALANCE * (work - mean), length * slower.get(i, 1))
        least = min(costs)
        if costs.count(least) == 1:
            return costs.index(least)
        return min((i for i, cost in enumerate(costs) if cost == least), key=recent.__getitem__)

    def work(self, load: Load) -> float:
        """Return the tokens that a replica is expected to compute before it is idle."""
        return load.queued_tokens + load.completions * self.mean_output

    def ended(self, output_tokens: int) -> None:
        """Note the length of a completion that has ended."""
        self.mean_output += SMOOTHING * (output_tokens - self.mean_output)


def cached_pages(loads: Sequence[Load], prefix: Prefix, page_size: int) -> list[int]:
    """Return, for each replica, how many of the prompt's first pages its engine has. The last token never counts."""
    counts = [0] * len(loads)
    left: Sequence[int] = range(len(loads))
    for page in range((len(prefix.tokens) - 1) // page_size):
        key = prefix.key(page)
        left = [i for i in left if key in loads[i].pages]
        if not left:
            break
        for i in left:
            counts[i] = page + 1
    return counts


def _most_cached_pages(loads: Sequence[Load], prefix: Prefix, page_size: int) -> tuple[list[int], list[bytes]]:
    """Return upper bounds of `cached_pages`, with few look-ups, and the keys of the first pages.

    Each bound is the number of a page that the replica lacks, while it has the one before. It is too high only if the
    replica lacks another page before these, which is rare, since engines evict a prompt's pages from the last one on.
    """
    most = (len(prefix.tokens) - 1) // page_size
    counts, count = list[int](), 0
    keys = [prefix.key(0)] if most else []
    last, following = b"", keys[0] if most else b""  # the keys of the pages count - 1 and count; b"" if there is none
    for load in loads:
        pages = load.pages
        if (following and following in pages) or (
            last and last not in pages
        ):  # the count differs from that of the replica before
            count = _bisect(pages, keys)
            while count == len(keys) < most:
                keys.append(prefix.key(count))
                count += keys[count] in pages
            last, following = keys[count - 1] if count else b"", keys[count] if count < most else b""
        counts.append(count)
    return counts, keys


def _bisect(pages: set[bytes], keys: list[bytes]) -> int:
    """Return the index of a key that is not among `pages`, while the one before is."""
    return bisect_left(keys, True, key=lambda key: key not in pages)


def _slower(loads: Sequence[Load]) -> dict[int, float]:
    """Return the replicas that are slower than the fastest one, with the ratio of their times per token."""
    seconds = [load.seconds_per_token for load in loads]
    if max(seconds) <= SIMILAR * min(seconds):
        return {}
    fastest = min(filter(None, seconds))
    return {i: each / fastest for i, each in enumerate(seconds) if each > SIMILAR * fastest}


def _fade(loads: Sequence[Load]) -> None:
    """Reduce the weight of recent work; called once per len(loads) choices. A new replica begins with the mean."""
    known = [load.recent for load in loads if load.recent >= 0]
    mean = sum(known) / max(1, len(known))
    for load in loads:
        load.recent = (load.recent if load.recent >= 0 else mean) * (1 - 1 / MEMORY)


def _keys(concatenated: bytes) -> Iterator[bytes]:
    return (concatenated[at : at + KEY_BYTES] for at in range(0, len(concatenated), KEY_BYTES))
