"""A simulated tier below the page pool, whose transfers take virtual time."""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count

import numpy as np

from octavo.backends.base import Backend
from octavo.kv import Transfers
from octavo.kv.transfers import Finished
from octavo.simulation import VirtualClock


class KeysOnly:
    """A Tier (see kv.tiers.tier) that holds the keys of at most `capacity` pages, and no content."""

    name = "simulated"
    refused = 0

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._keys: OrderedDict[bytes, None] = OrderedDict()  # least recently used first

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def read(self, key: bytes) -> np.ndarray | None:
        return None

    def write(self, key: bytes, content: np.ndarray) -> bool:
        self.keep(key)
        return True

    def keep(self, key: bytes) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._capacity:
            self._keys.popitem(last=False)

    def touch(self, key: bytes) -> bool:
        if key in self._keys:
            self._keys.move_to_end(key)
        return key in self._keys

    def close(self) -> None:
        pass


class SimulatedTransfers(Transfers):
    """Transfers that take `seconds_per_page` each. Fetches run one after another, saves in parallel to them."""

    def __init__(self, backend: Backend, clock: VirtualClock, capacity: int, seconds_per_page: float):
        self._tier = KeysOnly(capacity)
        super().__init__(backend, [self._tier])
        self.seconds_per_page = seconds_per_page
        self._clock = clock
        self._free_at = {"fetch": 0.0, "save": 0.0}
        self._moving: list[tuple[float, int, Finished]] = []  # heap by the time of completion
        self._order = count()

    def save(self, page: int, key: bytes) -> bool:
        if self.pending_saves >= self.max_saves or key in self._tier:
            return False
        self.pending_saves += 1
        self._begin(Finished("save", page, key, ok=True))
        return True

    def fetch(self, page: int, key: bytes) -> bool:
        if not self._tier.touch(key):
            return False
        self._begin(Finished("fetch", page, key, ok=True))
        return True

    def touch(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            self._tier.touch(key)

    def finished(self) -> list[Finished]:
        over = []
        while self._moving and self._moving[0][0] <= self._clock():
            done = heapq.heappop(self._moving)[2]
            over.append(done)
            if done.kind == "save":
                self._tier.keep(done.key)
                self.pending_saves -= 1
                self.pages_saved += 1
            else:
                self.pages_fetched += 1
        return over

    def wait(self, timeout: float) -> bool:
        now = self._clock()
        until = min(self._moving[0][0] if self._moving else now + timeout, now + timeout)
        self._clock.advance(max(0.0, until - now))
        return bool(self._moving) and self._moving[0][0] <= self._clock()

    def _begin(self, transfer: Finished) -> None:
        at = max(self._clock(), self._free_at[transfer.kind]) + self.seconds_per_page
        self._free_at[transfer.kind] = at
        heapq.heappush(self._moving, (at, next(self._order), transfer))
