"""The state of every page as a byte."""

from array import array

from octavo.kv.cache import KVCache
from octavo.kv.page_map import MAX_REFERENCES, PageState, page_states
from octavo.kv.prefix import Prefix


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
    for _ in range(300):
        kv.pool.acquire(0)
    assert states(kv)[:2] == [(PageState.SHARED, MAX_REFERENCES), (PageState.CACHED, 0)]
