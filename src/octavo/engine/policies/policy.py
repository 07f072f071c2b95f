"""Policy: the order in which requests are served. It holds the waiting sequences and chooses those to preempt.

`fcfs`, `priority` and `deadline` order requests by a rank that is fixed on arrival; `fair` (fair.py) keeps accounts.
"""

import heapq
from collections.abc import Collection, Iterable

from octavo.config import EngineConfig
from octavo.engine.sequence import Sequence

# The target of requests that set none under `deadline`: the time for which people keep their attention on a computer
# that does not answer (Nielsen, Usability Engineering, 1993). A request with a shorter target goes before requests
# without one that arrived earlier, by at most this time.
DEFAULT_TTFT_TARGET = 10.0


class WaitingQueue:
    """A heap of sequences by place. Operations take O(log n). Removed sequences stay until they reach the top."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, int], Sequence]] = []
        self._members: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._members)

    def add(self, seq: Sequence) -> None:
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [entry for entry in self._heap if entry[1] in self._members]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (seq.place, seq))
        self._members.add(seq)

    def first(self) -> Sequence | None:
        while self._heap and self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Remove the sequence that `first` returned."""
        self._members.discard(heapq.heappop(self._heap)[1])

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence, if it is there."""
        self._members.discard(seq)


class Policy:
    """First come, first served; the base class of all policies. The simplest policies override only `rank`:

        class ShortPromptsFirst(Policy):
            def rank(self, seq):
                return seq.arrival + 0.01 * len(seq.prompt)

    `--scheduling-policy package.module:ShortPromptsFirst` uses it. `self.config` is the EngineConfig.

    The scheduler calls `add` when a sequence begins to wait: `seq.admitted` is False for a new sequence, True for a
    preempted one. It admits only the sequence that `peek` returns, and then calls `pop`; by then, `seq.num_computed` is
    the number of tokens found in the cache. If a waiting sequence is aborted or fails, the scheduler calls `remove`.
    All calls come from one thread.

    An exception, or a result of the wrong type, fails the request that caused it. docs/scheduling.md describes this,
    and proves that every request is served in the end, under conditions that subclasses must keep.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        self._queue = WaitingQueue()

    def rank(self, seq: Sequence) -> float:
        """Return the rank of a new request, in seconds; lower ranks go first. Called once.

        A rank should contain `seq.arrival` (seconds on the engine's clock), so that waiting makes up for the rest.
        The request's id, tenant, prompt, params, priority and ttft_target are attributes of `seq`.
        """
        return seq.arrival

    def key(self, seq: Sequence) -> tuple[float, int]:
        """Return the sort key of a running or waiting sequence; lower keys go first."""
        return seq.place

    def add(self, seq: Sequence) -> None:
        """Add a waiting sequence. Its `place` is (rank, order of arrival)."""
        self._queue.add(seq)

    def peek(self) -> Sequence | None:
        """Return the waiting sequence to be admitted next; None if none is to be admitted now."""
        return self._queue.first()

    def pop(self) -> None:
        """Remove the sequence that `peek` returned, because it is admitted."""
        self._queue.pop()

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence that no longer waits, if it is in the queue."""
        self._queue.remove(seq)

    def charge(self, decoding: Iterable[Sequence]) -> None:
        """Account for one output token of each of these sequences. Called once per step."""

    def victim(self, running: Collection[Sequence]) -> Sequence:
        """Return the sequence to preempt when running sequences need pages.

        Args:
            running: the running sequences in order of admission; never empty.
        """
        return max(running, key=self.key)

    def preempt_for(self, waiting: Sequence, running: Collection[Sequence]) -> Sequence | None:
        """Return a running sequence to preempt so that `waiting` can be admitted, or None (the default) to let it wait.

        Called at most once per step, if the next sequence `waiting` lacks a slot or pages and more than one runs.
        """
        return None


class Priority(Policy):
    """Requests with lower `priority` go first. `priority_aging` seconds of waiting make up for one step of priority."""

    def rank(self, seq: Sequence) -> float:
        return seq.arrival + seq.priority * self.config.priority_aging


class Deadline(Policy):
    """Requests are served in order of the time at which their first token is due: arrival plus `ttft_target`."""

    def rank(self, seq: Sequence) -> float:
        return seq.arrival + (DEFAULT_TTFT_TARGET if seq.ttft_target is None else seq.ttft_target)
