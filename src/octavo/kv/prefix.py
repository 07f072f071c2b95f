"""Keys of pages, which identify the content of a page in the prefix cache and in the tiers below it.

    key[i] = BLAKE2b(tokens of page i, keyed with key[i - 1]),  key[-1] = root

The root is a hash of the fingerprint, the tenant, the salt and the origin. So equal keys mean equal prefixes, and a
request cannot find a page that was computed under another root, nor detect it by timing.
"""

import struct
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import msgspec

KEY_BYTES = 16


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


def page_keys(root: bytes, tokens: Sequence[int], page_size: int) -> Iterator[bytes]:
    """Yield the keys of the full pages of `tokens`, each computed when it is needed."""
    key, pack = root, struct.Struct(f"{page_size}i").pack
    for start in range(0, len(tokens) - page_size + 1, page_size):
        key = blake2b(pack(*tokens[start : start + page_size]), key=key, digest_size=KEY_BYTES).digest()
        yield key


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
        while len(keys) <= page:
            start = (len(keys) - 1) * size
            keys.append(blake2b(self.tokens[start : start + size], key=keys[-1], digest_size=KEY_BYTES).digest())
        return keys[page]

    def key(self, page: int) -> bytes:
        """Return the key of page number `page`, counted from 0, which must be full."""
        return self.parent(page + 1)
