"""Show the state of the page pool: as at most 512 letters, each for a range of pages, or as a byte for each page."""

from collections.abc import Collection
from enum import IntEnum

import numpy as np

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


class PageState(IntEnum):
    """What a page is, in the low 3 bits of a byte of `page_states`. The other bits are its references, at most 31."""

    FREE = 0
    CACHED = 1  # unreferenced, with content that a later request may find
    ONE = 2  # in use, with one reference
    SHARED = 3  # in use, with several references
    PINNED = 4  # in use by a KV state
    LOADING = 5  # being filled from a lower tier
    SAVING = 6  # being saved to a lower tier


MAX_REFERENCES = 31


def page_states(kv: KVCache) -> bytes:
    """Return a byte for each page, see PageState. For the thread that changes `kv`; some nanoseconds per page."""
    references, is_published = (np.frombuffer(each, np.uint8) for each in kv.pool.counts(MAX_REFERENCES))
    # FREE or CACHED, ONE or SHARED
    states = np.where(references == 0, is_published, np.minimum(references, 2) + 1)
    loading, saving = kv.moving_pages()
    for state, pages in (
        (PageState.PINNED, kv.pinned_pages()),
        (PageState.SAVING, saving),
        (PageState.LOADING, loading),
    ):
        states[_indices(pages)] = state
    return bytes(states | references << 3)


def _indices(pages: Collection[int]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.fromiter(pages, np.int64, len(pages))
