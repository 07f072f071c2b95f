"""Keys of pages, which identify the content of a page in the prefix cache and in the tiers below it.

    key[i] = BLAKE2b(tokens of page i, salt = key[i - 1]),  key[-1] = root

The root is a hash of the fingerprint, the tenant, the salt and the origin. So equal keys mean equal prefixes, and a
request cannot find a page that was computed under another root, nor detect it by timing.
"""

from array import array
from collections.abc import Iterator
from hashlib import blake2b

import msgspec

from octavo.kv import _page_keys

KEY_BYTES = 16
FIRST_KEYS = 4  # that page_keys computes at a time; then twice as many each time


def root_key(fingerprint: str, tenant: str, salt: str, origin: str = "") -> bytes:
    """Return the key that the first page of a prompt is chained to.

    Args:
        fingerprint: identifies everything that determines the bits of a page (EngineInfo.fingerprint).
        tenant, salt: those of the request.
        origin: the id of the loaded KV state that the request continues; "" if it continues none.
    """
    root = blake2b(msgspec.msgpack.encode((fingerprint, tenant, salt)), digest_size=KEY_BYTES).digest()
    return origin_root(root, origin) if origin else root


def origin_root(root: bytes, origin: str) -> bytes:
    """Return the root of sequences that continue the loaded KV state `origin`, given the root without an origin."""
    return blake2b(origin.encode(), key=root, person=b"octavo-origin", digest_size=KEY_BYTES).digest()


def page_keys(root: bytes, tokens: list[int], page_size: int) -> Iterator[bytes]:
    """Yield the keys of the full pages of `tokens`. They are computed a few at a time, when they are needed."""
    key, page, count, pages = root, 0, FIRST_KEYS, len(tokens) // page_size
    while page < pages:
        keys = _page_keys.page_keys(key, tokens, page_size, page, min(count, pages - page))
        yield from keys
        key, page, count = keys[-1], page + len(keys), 2 * count


class Prefix:
    """The keys of the full pages of `tokens`. Tokens may be appended; each key is computed once, when it is needed."""

    __slots__ = ("_keys", "_page_size", "tokens")

    def __init__(self, root: bytes, tokens: "array[int]", page_size: int):
        self.tokens = tokens
        self._page_size = page_size
        self._keys = [root]

    def parent(self, page: int) -> bytes:
        """Return the key that page number `page` is chained to. All pages before it must be full."""
        keys, size = self._keys, self._page_size
        if page >= len(keys):
            keys += _page_keys.page_keys(keys[-1], self.tokens, size, len(keys) - 1, page + 1 - len(keys))
        return keys[page]

    def key(self, page: int) -> bytes:
        """Return the key of page number `page`, counted from 0, which must be full."""
        return self.parent(page + 1)
