"""An index of the pages that sequences continue from the middle on, with a copy of their own.

These are the partial last pages of finished sequences, which the next turns of conversations copy, and the pages in
which prompts end, once the output has filled them: the same prompt again, or with another continuation, copies those.
"""

from array import array
from itertools import takewhile

from .page_pool import PagePool

MAX_SIBLINGS = 32  # indexed pages per preceding full page; a look-up compares with each of them


class PartialPages:
    """An index of pages by the key of the full page before them (or the root) and by their tokens.

    The pages are pages of `pool`, published under a key: if the pool does not find it, the page was evicted. A partial
    page's key is made from its parent's key and its own number. The latest MAX_SIBLINGS pages of each parent are kept.
    """

    def __init__(self, pool: PagePool):
        self._pool = pool
        self._after: dict[bytes, dict[int, array[int]]] = {}
        self._keys: dict[int, tuple[bytes, bytes]] = {}  # parent's key and own key of each page in the index

    def add(self, page: int, parent: bytes, tokens: "array[int]", key: bytes | None = None) -> None:
        """Index a page in use that begins with the K and V of `tokens`, which follow the page `parent`.

        Partial siblings whose tokens are a prefix of `tokens` are evicted. If `tokens` is a prefix of a sibling's
        tokens, the page is not indexed.

        Args:
            key: the key under which the page is published, if it is full.
        """
        self._remove(page)
        siblings = self._after.get(parent, {})
        for other, its_tokens in list(siblings.items()):
            if not self._is_valid(other) or its_tokens == tokens[: len(its_tokens)]:
                self._evict(other)
            elif its_tokens[: len(tokens)] == tokens:
                return
        if len(siblings) >= MAX_SIBLINGS:
            self._evict(next(iter(siblings)))
        if key is None:
            key = _partial_key(parent, page)
            self._pool.publish(page, key)
        self._after.setdefault(parent, {})[page] = tokens
        self._keys[page] = parent, key

    def find(self, parent: bytes, tokens: "array[int]") -> tuple[int | None, int]:
        """Return the page after `parent` with the longest common prefix with `tokens`, and its length; or (None, 0)."""
        best, most = None, 0
        for page, its_tokens in self._after.get(parent, {}).items():
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(its_tokens, tokens, strict=False)))
            if common > most and self._is_valid(page):
                best, most = page, common
        return best, most

    def _is_valid(self, page: int) -> bool:
        """Return whether the pool still has the page."""
        return self._pool.find(self._keys[page][1]) == page

    def _evict(self, page: int) -> None:
        """Take a page out of the index, and out of the pool if only the index leads to it."""
        parent, key = self._keys[page]
        if key == _partial_key(parent, page) and self._is_valid(page):
            self._pool.evict(page)
        self._remove(page)

    def _remove(self, page: int) -> None:
        if keys := self._keys.pop(page, None):
            parent, _ = keys
            del self._after[parent][page]
            if not self._after[parent]:
                del self._after[parent]


def _partial_key(parent: bytes, page: int) -> bytes:
    """Return the key of a partial page. It is longer than the key of a full page, so the two never collide."""
    return parent + page.to_bytes(4, "little")
