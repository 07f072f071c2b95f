"""SharedPages: the pages that an engine can get from others: from another engine first, then from the store."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

import numpy as np

from octavo.kv.peers.fetching import Peers
from octavo.kv.tiers.counts import TierCounts

from .page_values import PageValues
from .store import Store

Value = bytes | bytearray | memoryview
PROBE = "octavo:kv1:probe"  # a name without a value


class SharedPages:
    """Answers for the store and for the engines that the frontend has named. A lost engine is a miss, not an error.

    Args:
        store: None if there is none.
        peers: None if other engines cannot be asked.

    Attributes:
        counts: what has come from each of the two: by "store" and "peers".
    """

    def __init__(self, values: PageValues, store: Store | None, peers: Peers | None):
        self._values, self._store, self._peers = values, store, peers
        names = ["store"] * (store is not None) + ["peers"] * (peers is not None)
        self.counts = {name: TierCounts() for name in names}

    def held_by_peers(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the first of `keys`, as far as other engines are expected to have them."""
        return list(takewhile(self._holder, keys))

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        """Return for each page whether somebody is expected to have it. Without keys, ask the store for anything."""
        found = [self._holder(key) is not None for key in keys]
        if self._store is None or (keys and all(found)):
            return found
        others = [i for i, is_there in enumerate(found) if not is_there]
        answers = self._store.has([self._values.name(keys[i]) for i in others] or [PROBE])
        for i, is_there in zip(others, answers, strict=False):
            found[i] = bool(is_there)
        return found

    def get(self, keys: Sequence[bytes]) -> Iterator[tuple[Value | None, TierCounts]]:
        """Yield the value of each page, None if it is lost, and the counts of where it was looked for.

        A value need only stay valid until the next one.
        """
        left = list(keys)
        while left:
            holder = self._holder(left[0])
            run = list(takewhile(lambda key: self._holder(key) == holder, left))  # noqa: B023 (used at once)
            values: Iterable[Value | None]
            if holder is not None and self._peers is not None:
                values, counts = self._peers.fetch(holder, run), self.counts["peers"]
            elif self._store is not None:
                values, counts = self._store.get([self._values.name(key) for key in run]), self.counts["store"]
            else:
                yield None, self.counts["peers"]
                return
            arrived = 0
            for _, value in zip(run, values, strict=False):
                arrived += 1
                yield value, counts
            if holder is None and arrived < len(run):
                return
            del left[:arrived]  # what an engine has not sent is not expected of it any more

    def end_reading(self) -> None:
        """Release the connections of `get`, for the thread that has called it."""
        if self._peers is not None:
            self._peers.disconnect()

    def open(self, key: bytes, value: Value) -> np.ndarray | None:
        """Return the content in a value; None if it is not the unchanged value of this page."""
        return self._values.open(key, value)

    def _holder(self, key: bytes) -> str | None:
        return None if self._peers is None else self._peers.holder(key)
