"""Who is served next. A policy owns the waiting sequences and their order, and says who gives way when pages are short.

`fcfs`, `priority` and `deadline` order requests by a rank, fixed when they come; `fair` (fair.py) keeps accounts.
"""

import heapq
from collections.abc import Collection, Iterable

from octavo.config import EngineConfig
from octavo.engine.messages import EngineRequest
from octavo.engine.sequence import Sequence

# Of a request that names no target under `deadline`: how long people keep their mind on a computer that does not
# answer (Nielsen, Usability Engineering, 1993). Requests with a target below it go first, up to that much later ones.
DEFAULT_TTFT_TARGET = 10.0


class WaitingQueue:
    """Sequences by place, all operations O(log n). Aborted ones go when they surface, or are more than the others."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, int], Sequence]] = []
        self._num_waiting = 0

    def __bool__(self) -> bool:
        return self._num_waiting > 0

    def add(self, seq: Sequence) -> None:
        if len(self._heap) > 2 * self._num_waiting + 16:
            self._heap = [entry for entry in self._heap if not entry[1].aborted]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (seq.place, seq))
        self._num_waiting += 1

    def first(self) -> Sequence | None:
        while self._heap and self._heap[0][1].aborted:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Take out what `first` gave."""
        heapq.heappop(self._heap)
        self._num_waiting -= 1

    def forget(self) -> None:
        """One of those in here was aborted."""
        self._num_waiting -= 1


class Policy:
    """First come, first served. Every other policy is a subclass; the simplest overrides `rank` and nothing else:

        class ShortPromptsFirst(Policy):
            def rank(self, request):
                return request.arrival + 0.01 * len(request.prompt)

    `--scheduling-policy package.module:ShortPromptsFirst` uses it. `self.config` is the EngineConfig.

    The scheduler's side of the contract: a sequence is `add`ed when it begins to wait, be it new or preempted
    (`seq.admitted` tells). Only what `peek` names is admitted; then it is `pop`ped, `num_computed` tokens of it having
    been found in the cache. One that is aborted while it waits is `remove`d. All calls come from one thread.

    Why everybody is served: a rank grows with the time of arrival, so only so many requests can come that go before a
    given one, and in the end it is the first of all. If it waits then, nobody else is admitted; and of those that run,
    the first in order is no victim while others run, and fits when it is alone: so it advances in every step and ends,
    and so does the next, until ours is admitted. From then on ours is the one that is no victim. Who overrides `key`
    or `victim` has to see to this anew.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        self._queue = WaitingQueue()

    def rank(self, request: EngineRequest) -> float:
        """Requests go in order of rank, in seconds since the epoch; asked once. Keep the arrival in it: so they age."""
        return request.arrival

    def key(self, seq: Sequence) -> tuple[float, int]:
        """Sorts sequences, running or waiting, into the order in which they go first."""
        return seq.place

    def add(self, seq: Sequence) -> None:
        """`seq` waits from now on; its `place` is (rank, order of arrival)."""
        self._queue.add(seq)

    def peek(self) -> Sequence | None:
        """Who is to be admitted next."""
        return self._queue.first()

    def pop(self) -> None:
        """The one that `peek` named is admitted."""
        self._queue.pop()

    def remove(self, seq: Sequence) -> None:
        """`seq`, which waited, was aborted."""
        self._queue.forget()

    def charge(self, decoding: Iterable[Sequence]) -> None:
        """Each of these gets one more token in this step."""

    def victim(self, running: Collection[Sequence]) -> Sequence:
        """Who loses its pages to the others and waits again. `running` is in order of admission, and not empty."""
        return max(running, key=self.key)

    def makes_way(self, waiting: Sequence, running: Collection[Sequence]) -> Sequence | None:
        """Who is to wait again for the sake of `waiting`, the next one, which lacks a slot or pages; as a rule nobody.

        Asked once a step, if more than one runs.
        """
        return None


class Priority(Policy):
    """Lower priorities go first. `priority_aging` seconds of waiting make up for one step of it."""

    def rank(self, request: EngineRequest) -> float:
        return request.arrival + request.priority * self.config.priority_aging


class Deadline(Policy):
    """Who must have its first token the soonest goes first: by arrival plus `ttft_target`."""

    def rank(self, request: EngineRequest) -> float:
        target = DEFAULT_TTFT_TARGET if request.ttft_target is None else request.ttft_target
        return request.arrival + target
