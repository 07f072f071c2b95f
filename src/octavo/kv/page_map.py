"""Show the state of the page pool as a string of at most 512 letters, each for a range of pages."""

from .cache import KVCache
from .page_pool import CACHED, FREE, IN_USE

PINNED, MOVING = "p", "m"  # in use by a KV state; being filled from a lower tier
MAX_CELLS = 512
MAX_SAMPLES = 8  # evenly spaced pages that are checked for a cell, so that the cost does not grow with the pool

_STATES = (IN_USE, CACHED, FREE, PINNED, MOVING)


def page_map(kv: KVCache) -> str:
    """Return one letter per cell. Cells divide the pool into equal ranges and show their most common states."""
    num_pages = kv.pool.num_pages
    cells = min(num_pages, MAX_CELLS)
    pinned = kv.pinned_pages()

    def state(page: int) -> str:
        if kv.is_fetching(page):
            return MOVING
        return PINNED if page in pinned else kv.pool.state(page)

    def cell(first: int, end: int) -> str:
        seen = [state(page) for page in range(first, end, -(-(end - first) // MAX_SAMPLES))]
        return max(_STATES, key=seen.count)

    return "".join(cell(i * num_pages // cells, (i + 1) * num_pages // cells) for i in range(cells))
