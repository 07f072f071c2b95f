"""Deadlines of requests."""

import heapq

_SLACK = 64


class Deadlines:
    """A set of ids with a deadline each, in seconds of one clock. Operations take O(log n), amortized."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []  # removed ids stay until they reach the top or outnumber the others

    def __len__(self) -> int:
        return len(self._at)

    @property
    def next(self) -> float | None:
        """Return a time before which there is no deadline. It may be that of a forgotten id. None if there is none."""
        return self._heap[0][0] if self._at else None

    def set(self, id: str, at: float) -> None:
        """Set the deadline of an id that has none."""
        self._at[id] = at
        heapq.heappush(self._heap, (at, id))

    def forget(self, id: str) -> None:
        """Remove the deadline of an id, if it has one."""
        self._at.pop(id, None)
        if len(self._heap) > 2 * len(self._at) + _SLACK:
            self._heap = [(at, id) for id, at in self._at.items()]
            heapq.heapify(self._heap)

    def passed(self, now: float) -> list[str]:
        """Remove and return the ids whose deadline is not after `now`, the earliest first."""
        ids = []
        while self._heap and self._heap[0][0] <= now:
            at, id = heapq.heappop(self._heap)
            if self._at.get(id) == at:
                del self._at[id]
                ids.append(id)
        return ids
