"""Gives sequences their pages, and finds what is already computed: the prefix cache.

A full page's key is a hash of its tokens and of the key of the page before it, so equal keys mean equal prefixes, and
finding a prefix takes one look-up per page. Because a token's K and V are bitwise the same however they came about, a
page found is as good as a page computed; a fork is just a sequence whose prefix is found.
"""

from array import array
from dataclasses import dataclass, field
from hashlib import blake2b

from .page_pool import PagePool


@dataclass(slots=True)
class SequencePages:
    """The pages of one sequence, in order of position; `keys` are those of its full and computed ones."""

    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)


class KVCache:
    """Page tables over one PagePool. `page_size` is in tokens."""

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True):
        self.pool = PagePool(num_pages)
        self.page_size = page_size
        self.prefix_caching = prefix_caching

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def admit(self, tokens: "array[int]", spare: int = 0) -> tuple[SequencePages, int] | None:
        """Pages for a new sequence of these tokens, and how many tokens of it are already computed.

        At least the last token is left to compute: its logits are wanted. None, and nothing held, if the pages that
        all of `tokens` needs are not to be had now with `spare` pages to remain.
        """
        held = SequencePages()
        self._hold_prefix(held, tokens)
        missing = self.pages_for(len(tokens)) - len(held.pages)
        if missing + spare > self.pool.num_available:
            self.release(held)
            return None
        self.grow(held, len(tokens))
        return held, len(held.keys) * self.page_size

    def grow(self, held: SequencePages, num_tokens: int) -> bool:
        """Take pages until `num_tokens` tokens have room. False, and nothing taken, if too few are to be had."""
        missing = self.pages_for(num_tokens) - len(held.pages)
        if missing > self.pool.num_available:
            return False
        held.pages.extend(self.pool.take() for _ in range(missing))
        return True

    def commit(self, held: SequencePages, tokens: "array[int]", num_computed: int) -> None:
        """K and V of the first `num_computed` tokens are in the pages now: publish those that became full."""
        if not self.prefix_caching:
            return
        while len(held.keys) < num_computed // self.page_size:
            key = self._key(held.keys, tokens)
            self.pool.publish(held.pages[len(held.keys)], key)
            held.keys.append(key)

    def release(self, held: SequencePages) -> None:
        """Let go of all pages. The last goes first, so that a prefix outlives what followed it."""
        for page in reversed(held.pages):
            self.pool.release(page)
        held.pages.clear()
        held.keys.clear()

    def _hold_prefix(self, held: SequencePages, tokens: "array[int]") -> None:
        if not self.prefix_caching:
            return
        while (len(held.keys) + 1) * self.page_size < len(tokens):
            key = self._key(held.keys, tokens)
            page = self.pool.find(key)
            if page is None:
                return
            self.pool.hold(page)
            held.pages.append(page)
            held.keys.append(key)

    def _key(self, keys: list[bytes], tokens: "array[int]") -> bytes:
        """Key of the page after those of `keys`."""
        start = len(keys) * self.page_size
        content = tokens[start : start + self.page_size].tobytes()
        return blake2b(content, key=keys[-1] if keys else b"", digest_size=16).digest()
