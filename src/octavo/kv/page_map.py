"""The page pool at a glance: a letter for each of at most 512 cells."""

from .cache import KVCache
from .page_pool import CACHED, FREE, HELD

PINNED, MOVING = "p", "m"  # held by a KV state; on the way from a lower tier
MAX_CELLS = 512
LOOKS = 8  # pages that are looked at for a cell, evenly spread: the cost does not grow with the pool

_STATES = (HELD, CACHED, FREE, PINNED, MOVING)


def page_map(kv: KVCache) -> str:
    """Cell i of n stands for the i-th n-th of the pool, with the letter of the state that most of its pages are in."""
    num_pages = kv.pool.num_pages
    cells = min(num_pages, MAX_CELLS)
    pinned = kv.pinned_pages()

    def state(page: int) -> str:
        if kv.is_fetching(page):
            return MOVING
        return PINNED if page in pinned else kv.pool.state(page)

    def cell(first: int, end: int) -> str:
        seen = [state(page) for page in range(first, end, max(1, (end - first) // LOOKS))]
        return max(_STATES, key=seen.count)

    return "".join(cell(i * num_pages // cells, (i + 1) * num_pages // cells) for i in range(cells))
