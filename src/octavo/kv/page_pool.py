"""The pool of KV pages: who holds which page, and which unheld pages still have content worth keeping.

A page is in one of three states: free (no content), held (by one or more sequences), or cached (held by nobody, its
content known by a key, first to be forgotten when it was used least recently). Every operation is O(1).
"""

from collections import OrderedDict

FREE, HELD, CACHED = ".", "h", "c"


class PagePool:
    """Pages 0 .. num_pages - 1. Pure bookkeeping: the memory is the backend's."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        self._key: list[bytes | None] = [None] * num_pages
        self._free = [*reversed(range(num_pages))]  # the last is taken first: its memory is warm
        # In order of last use. (A plain dict would walk over all that went before, each time its first is taken.)
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that `take` can give: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def state(self, page: int) -> str:
        """FREE, HELD or CACHED."""
        return HELD if self._holders[page] else FREE if self._key[page] is None else CACHED

    def take(self) -> int:
        """A page of one's own, content undefined; if none is free, a cached one. Needs num_available > 0."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page with that content, held or cached."""
        return self._page_of.get(key)

    def hold(self, page: int) -> None:
        """One more holder of a page that `find` gave."""
        self._cached.pop(page, None)
        self._holders[page] += 1

    def publish(self, page: int, key: bytes) -> None:
        """The content of the held page is what `key` says. The first page of a content is the one found."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._key[page] = key

    def forget(self, page: int) -> None:
        """A page that `find` gives is not to be found any more; if nobody holds it, it is free."""
        self._forget(page)
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def release(self, page: int) -> None:
        """One holder less. Without holders a published page is cached, any other is free."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if self._key[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def _forget(self, page: int) -> None:
        key = self._key[page]
        assert key is not None
        del self._page_of[key]
        self._key[page] = None
