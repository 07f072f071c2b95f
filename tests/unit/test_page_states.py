"""The state of every page as a byte."""

from array import array
from threading import Event

import numpy as np

from octavo.kv.cache import KVCache
from octavo.kv.page_map import MAX_REFERENCES, PageState, page_states
from octavo.kv.prefix import Prefix
from octavo.kv.transfers import Transfers
from prefix_backend import PrefixBackend


def states(kv: KVCache) -> list[tuple[PageState, int]]:
    """State and references of each page."""
    return [(PageState(byte & 7), byte >> 3) for byte in page_states(kv)]


def test_states_of_pages() -> None:
    kv = KVCache(8, 4)
    prefix = Prefix(bytes(16), array("i", range(9)), 4)
    table, _ = kv.allocate(prefix) or (None, 0)
    assert table is not None
    kv.commit(table, 8)
    used = sorted(table.pages)
    assert states(kv) == [(PageState.ONE, 1)] * 3 + [(PageState.FREE, 0)] * 5 and used == [0, 1, 2]
    again, cached = kv.allocate(prefix) or (None, 0)
    assert again is not None and cached == 8
    assert states(kv)[:4] == [(PageState.SHARED, 2)] * 2 + [(PageState.ONE, 1)] * 2
    kv.pin("state", prefix)
    assert states(kv)[:3] == [(PageState.PINNED, 3)] * 2 + [(PageState.ONE, 1)]
    kv.release(again)
    kv.release(table)
    assert states(kv)[:3] == [(PageState.PINNED, 1)] * 2 + [(PageState.FREE, 0)]
    kv.unpin("state")
    assert states(kv)[:3] == [(PageState.CACHED, 0)] * 2 + [(PageState.FREE, 0)]
    for _ in range(256):
        kv.pool.acquire(0)
    assert states(kv)[:2] == [(PageState.SHARED, MAX_REFERENCES), (PageState.CACHED, 0)]


class SlowTier:
    """Keeps pages; reads and writes wait until `go` is set."""

    name = "slow"

    def __init__(self) -> None:
        self.pages: dict[bytes, np.ndarray] = {}
        self.go = Event()

    def __contains__(self, key: bytes) -> bool:
        return key in self.pages

    def read(self, key: bytes) -> np.ndarray | None:
        self.go.wait(10)
        return self.pages.get(key)

    def write(self, key: bytes, content: np.ndarray) -> bool:
        self.go.wait(10)
        self.pages[key] = content
        return True

    def touch(self, key: bytes) -> bool:
        return key in self.pages

    def close(self) -> None: ...


def test_states_of_pages_that_move() -> None:
    tier = SlowTier()
    transfers = Transfers(PrefixBackend(64, 4), [tier], threads=1)
    kv = KVCache(64, 4, transfers=transfers)
    prefix = Prefix(bytes(16), array("i", range(9)), 4)
    table, _ = kv.allocate(prefix) or (None, 0)
    assert table is not None
    kv.commit(table, 8)
    kv.collect()  # begins to save the first full page, as at most 64 / 64 pages are saved at the same time
    assert [state for state, _ in states(kv)[:3]].count(PageState.SAVING) >= 1
    tier.go.set()
    kv.flush(10)
    assert not [state for state, _ in states(kv) if state is PageState.SAVING] and len(tier.pages) == 2
    kv.release(table)
    assert kv.reset()
    tier.go.clear()
    prefetch = kv.prefetch(prefix)
    assert prefetch is not None and prefetch.pending == 2
    assert [state for state, _ in states(kv)].count(PageState.LOADING) == 2
    tier.go.set()
    while prefetch.pending:
        kv.wait(1)
        kv.collect()
    kv.end_prefetch(prefetch)
    assert [state for state, _ in states(kv)].count(PageState.CACHED) == 2
    transfers.close()
