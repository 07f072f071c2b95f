"""Encryption of KV pages and states on disk, with a key of 256 bits from the setting kv_key.

A sealed text is

    32 bytes    salt, random
    rest        AES-256-GCM of the content, and its tag of 16 bytes

Each sealed text has an AES key of its own, derived by HKDF-SHA256 from the setting's key and the salt, and the key
encrypts nothing else. So no nonce is ever used twice, whatever process wrote what and when, and the nonce is 0.

The key of a page is a hash of tokens: whoever can guess a prompt could check the guess. So pages are named on disk by
a keyed hash of their keys, and a page is authenticated together with its key: under another name, it is not valid.
"""

import os
from hashlib import blake2b

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_SALT, _TAG = 32, 16  # bytes
OVERHEAD = _SALT + _TAG
_NONCE = bytes(12)


class Tampered(ValueError):
    """A sealed text that was changed, or that belongs to another key or name."""


class PageCipher:
    """Seals and opens pages and texts. Thread-safe.

    Args:
        key: 64 hexadecimal digits.
    """

    def __init__(self, key: str):
        self._key = bytes.fromhex(key)
        self._names = self._derived(b"names", b"")

    def __repr__(self) -> str:
        return "PageCipher(***)"

    def name(self, key: bytes) -> bytes:
        """Return the name on disk, 16 bytes, of the page with this key."""
        return blake2b(key, key=self._names, digest_size=16).digest()

    def seal(self, content: bytes | memoryview, bound: bytes) -> bytes:
        """Encrypt `content`. `bound` is authenticated with it but not stored: `open` needs the same."""
        salt = os.urandom(_SALT)
        return salt + AESGCM(self._derived(b"pages", salt)).encrypt(_NONCE, content, bound)

    def open(self, sealed: bytes | memoryview, bound: bytes) -> bytes:
        """Return the content of a sealed text. Raises Tampered."""
        if len(sealed) < OVERHEAD:
            raise Tampered("it is too short")
        salt, encrypted = bytes(sealed[:_SALT]), sealed[_SALT:]
        try:
            return AESGCM(self._derived(b"pages", salt)).decrypt(_NONCE, encrypted, bound)
        except InvalidTag:
            raise Tampered("it was changed, or encrypted with another key") from None

    def _derived(self, purpose: bytes, salt: bytes) -> bytes:
        return HKDF(SHA256(), 32, salt=salt, info=b"octavo kv " + purpose).derive(self._key)
