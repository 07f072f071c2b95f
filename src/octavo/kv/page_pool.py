"""PagePool: keeps track of which KV pages are in use, and which unused pages have cached content.

A page is free (no content), in use (referenced by one or more sequences, states or transfers), or cached (unreferenced,
with content that `find` returns by key). The least recently used cached page is evicted first. Every operation is O(1).
"""

from collections import OrderedDict
from collections.abc import Collection

import numpy as np

FREE, IN_USE, CACHED = ".", "h", "c"  # letters of the page map in GET /stats


class PagePool:
    """The bookkeeping of pages 0 .. num_pages - 1. The backend owns their memory."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._has_key = bytearray(num_pages)
        self._times_allocated = [0] * num_pages
        self._key: list[bytes | None] = [None] * num_pages
        self._free = [*reversed(range(num_pages))]  # the last is allocated first: its memory is warm
        # In order of last use. (A plain dict would skip over all deleted entries each time that its first is popped.)
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._changes: dict[bytes, bool] | None = None  # keys that `find` has gained (True) and lost since `changes`

    @property
    def num_available(self) -> int:
        """Return the number of pages that can be allocated: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def state(self, page: int) -> str:
        """Return FREE, IN_USE or CACHED."""
        return IN_USE if self._references[page] else FREE if self._key[page] is None else CACHED

    def counts(self, most: int) -> tuple[bytes, bytes]:
        """Return a byte for each page with its references, `most` for more, and one that is 1 if it was published."""
        try:
            references = bytes(self._references)
        except ValueError:  # a page has more than 255
            references = np.minimum(np.array(self._references), most).astype(np.uint8).tobytes()
        return references.translate(bytes(min(each, most) for each in range(256))), bytes(self._has_key)

    def allocate(self) -> int:
        """Return a page with one reference and undefined content. If none is free, evict a cached page.

        num_available must be above 0.
        """
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._forget_key(page)
        self._references[page] = 1
        self._times_allocated[page] += 1
        return page

    def find(self, key: bytes) -> int | None:
        """Return the page with the content of `key`, in use or cached; None if there is none. From any thread."""
        return self._page_of.get(key)

    def times_allocated(self, page: int) -> int:
        """Return a number that grows before the content of a published page changes. From any thread."""
        return self._times_allocated[page]

    def acquire(self, page: int) -> None:
        """Add a reference to a page that `find` returned."""
        self._cached.pop(page, None)
        self._references[page] += 1

    @property
    def keys(self) -> Collection[bytes]:
        """Return the keys of all published pages."""
        return self._page_of.keys()

    def watch(self) -> None:
        """Begin to record changes of `keys`."""
        self._changes = {}

    def take_changes(self) -> dict[bytes, bool]:
        """Return the keys that were published (True) or forgotten (False) since the last call; {} if not watched."""
        if not self._changes:
            return {}
        changes, self._changes = self._changes, {}
        return changes

    def publish(self, page: int, key: bytes) -> bool:
        """Make `find` return a page in use for `key`. Return False if another page already has this content."""
        if key in self._page_of:
            return False
        self._page_of[key] = page
        self._key[page] = key
        self._has_key[page] = 1
        if self._changes is not None:
            self._changes[key] = True
        return True

    def evict(self, page: int) -> None:
        """Make `find` no longer return a published page. If the page is unreferenced, it becomes free."""
        self._forget_key(page)
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def evict_all(self) -> None:
        """Evict all cached pages."""
        for page in list(self._cached):
            self.evict(page)

    def release(self, page: int) -> None:
        """Drop one reference. After the last one, the page is cached if it was published, otherwise free."""
        self._references[page] -= 1
        if self._references[page] == 0:
            if self._key[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def _forget_key(self, page: int) -> None:
        key = self._key[page]
        assert key is not None
        del self._page_of[key]
        self._key[page] = None
        self._has_key[page] = 0
        if self._changes is not None:
            self._changes[key] = False
