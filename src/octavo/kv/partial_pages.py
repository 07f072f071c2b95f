"""The partial last pages of sequences that have ended: where the next turns of their conversations go on."""

from array import array
from itertools import takewhile

from .page_pool import PagePool

MOST = 32  # after the same full page: each is compared with what is looked for


class PartialPages:
    """Pages by the key of the full page before them (or the root), and the tokens in them; the latest MOST of each.

    They are pages of `pool` as others are, unheld and forgotten when nobody has used them for long. So one is good only
    as long as the pool finds it under the key that it had from here.
    """

    def __init__(self, pool: PagePool):
        self._pool = pool
        self._after: dict[bytes, dict[int, array[int]]] = {}
        self._parent: dict[int, bytes] = {}  # of each page in there

    def add(self, page: int, parent: bytes, tokens: "array[int]") -> None:
        """The held `page` begins with K and V of `tokens`, which come after those of `parent`."""
        self._remove(page)
        others = self._after.get(parent, {})
        for other, its_tokens in list(others.items()):
            if not self._is_good(other) or its_tokens == tokens[: len(its_tokens)]:  # the new one serves for both
                self._forget(other)
            elif its_tokens[: len(tokens)] == tokens:
                return
        if len(others) >= MOST:
            self._forget(next(iter(others)))
        self._after.setdefault(parent, {})[page] = tokens
        self._parent[page] = parent
        self._pool.publish(page, _key(parent, page))

    def find(self, parent: bytes, tokens: "array[int]") -> tuple[int | None, int]:
        """The page with the most of `tokens` after those of `parent`, and how many they are."""
        best, most = None, 0
        for page, its_tokens in self._after.get(parent, {}).items():
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(its_tokens, tokens, strict=False)))
            if common > most and self._is_good(page):
                best, most = page, common
        return best, most

    def _is_good(self, page: int) -> bool:
        return self._pool.find(_key(self._parent[page], page)) == page

    def _forget(self, page: int) -> None:
        if self._is_good(page):
            self._pool.forget(page)
        self._remove(page)

    def _remove(self, page: int) -> None:
        if parent := self._parent.pop(page, None):
            del self._after[parent][page]
            if not self._after[parent]:
                del self._after[parent]


def _key(parent: bytes, page: int) -> bytes:
    """Longer than that of a full page, so no such page has it."""
    return parent + page.to_bytes(4, "little")
