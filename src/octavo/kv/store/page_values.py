"""PageValues: what a page is in a store: a name, and a value that shows whether it was changed.

    name     octavo:kv1:FINGERPRINT:KEY, both in hexadecimal
    value    XXH3 (128 bits) of the content, seeded with the key; the content

With a cipher, the name has a keyed hash instead of KEY, and the value is the sealed content, bound to the key.
"""

from typing import TYPE_CHECKING

import numpy as np
from xxhash import xxh3_128_digest

if TYPE_CHECKING:
    from octavo.formats.page_cipher import PageCipher

CHECKSUM = 16  # bytes
MAX_OVERHEAD = 256  # bytes that a value has beside the content of its page, at most
_SHOWN = 8  # hexadecimal digits of the fingerprint in a name; the key depends on all of it


class PageValues:
    """Names pages, and turns their contents into values and back. Thread-safe.

    Args:
        fingerprint: that of the engine, from which all its keys follow.
        page_bytes: size of a page's content.
        cipher: encrypts pages; None: they are only protected against accidents.
    """

    def __init__(self, fingerprint: str, page_bytes: int, cipher: "PageCipher | None" = None):
        self._prefix = f"octavo:kv1:{fingerprint[:_SHOWN]}:"
        self._page_bytes, self._cipher = page_bytes, cipher

    def name(self, key: bytes) -> str:
        """Return the name of the page with this key."""
        return self._prefix + (self._cipher.name(key) if self._cipher is not None else key).hex()

    def seal(self, key: bytes, content: np.ndarray, into: bytearray | None = None) -> memoryview:
        """Return the value of a page with this content, uint8 [page_bytes], in memory of its own.

        Args:
            into: it may lie there instead; this is resized.
        """
        if self._cipher is not None:
            return memoryview(self._cipher.seal(content.data, key))
        size = CHECKSUM + self._page_bytes
        if into is None:
            into = bytearray(size)
        elif len(into) != size:
            into[:] = bytes(size)
        value = memoryview(into)
        value[CHECKSUM:] = content.data  # first, as the checksum must be that of what is sent
        value[:CHECKSUM] = _checksum(key, value[CHECKSUM:])
        return value

    def open(self, key: bytes, value: bytes | bytearray | memoryview) -> np.ndarray | None:
        """Return the content in a value, uint8 [page_bytes]; None if it is not the unchanged value of this page."""
        if not isinstance(value, bytes | bytearray | memoryview):
            return None
        content: bytes | memoryview
        if self._cipher is not None:
            from octavo.formats.page_cipher import Tampered

            try:
                content = self._cipher.open(memoryview(value), key)
            except Tampered:
                return None
        else:
            content = memoryview(value)[CHECKSUM:]
            if _checksum(key, content) != bytes(value[:CHECKSUM]):
                return None
        return np.frombuffer(content, np.uint8) if len(content) == self._page_bytes else None


def _checksum(key: bytes, content: memoryview) -> bytes:
    return xxh3_128_digest(content, seed=int.from_bytes(key[:8], "little"))
