"""Router: choose the replica that can finish a request soonest."""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from octavo.kv import Prefix
from octavo.kv.prefix import KEY_BYTES

USUAL_OUTPUT = 128.0  # expected tokens per completion, as long as none has ended
SMOOTHING = 0.02  # weight of the latest completion in the mean length of outputs


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
        last: number of the latest request that was sent here; of equal replicas, the one with the lowest is chosen.
    """

    pages: set[bytes] = field(default_factory=set)
    unstarted: dict[Hashable, int] = field(default_factory=dict)
    queued_tokens: int = 0
    completions: int = 0
    number: int = 0
    seconds_per_token: float = 0.0
    last: int = 0

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

        cost = (tokens to compute + queued tokens) / speed + decode load
        decode load = unfinished completions * mean length of outputs / speed

    Tokens to compute are those whose pages the replica's engine does not have. So a long cached prefix outweighs a
    little more load, and much more load outweighs the prefix. The time of a choice grows with the pages of the prompt
    that replicas have, not with the number of known pages.
    """

    def __init__(self) -> None:
        self.mean_output = USUAL_OUTPUT
        self._counter = itertools.count(1)

    def choose(self, loads: Sequence[Load], prefix: Prefix, page_size: int) -> tuple[int, int]:
        """Return the index of the best of `loads` for a prompt, and the number of its tokens that are cached there."""
        length = len(prefix.tokens)
        usual = min((load.seconds_per_token for load in loads if load.seconds_per_token), default=1.0)
        best, cached_there, least = 0, 0, (float("inf"), 0)
        for i, (load, pages) in enumerate(zip(loads, cached_pages(loads, prefix, page_size), strict=True)):
            cached = pages * page_size
            cost = (length - cached + self.work(load)) * (load.seconds_per_token or usual)
            if (cost, load.last) < least:
                best, cached_there, least = i, cached, (cost, load.last)
        loads[best].last = next(self._counter)
        return best, cached_there

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


def _keys(concatenated: bytes) -> Iterator[bytes]:
    return (concatenated[at : at + KEY_BYTES] for at in range(0, len(concatenated), KEY_BYTES))
