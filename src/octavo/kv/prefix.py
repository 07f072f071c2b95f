"""The keys of a sequence's full pages: what the prefix cache and the tiers below it know content by.

A page's key is a hash of its tokens and of the key of the page before it; the first page's comes after a root, which
stands for the model, the tenant and the salt. So equal keys mean equal prefixes of one tenant on one model, and nobody
can find, or time, a page without the tenant and the salt that it was computed under.
"""

from array import array
from hashlib import blake2b

import msgspec

KEY_BYTES = 16


def root_key(fingerprint: str, tenant: str, salt: str) -> bytes:
    """What the first page of a prompt comes after."""
    return blake2b(msgspec.msgpack.encode((fingerprint, tenant, salt)), digest_size=KEY_BYTES).digest()


class Prefix:
    """Keys of the full pages of `tokens`, which may grow; each is computed once, when it is first asked for."""

    __slots__ = ("_keys", "_page_size", "tokens")

    def __init__(self, root: bytes, tokens: "array[int]", page_size: int):
        self.tokens = tokens
        self._page_size = page_size
        self._keys = [root]

    def parent(self, page: int) -> bytes:
        """The key that page number `page` comes after; all pages before it must be full."""
        keys, size = self._keys, self._page_size
        while len(keys) <= page:
            start = (len(keys) - 1) * size
            keys.append(
                blake2b(self.tokens[start : start + size].tobytes(), key=keys[-1], digest_size=KEY_BYTES).digest()
            )
        return keys[page]

    def key(self, page: int) -> bytes:
        """The key of page number `page`, from 0; it must be full."""
        return self.parent(page + 1)
