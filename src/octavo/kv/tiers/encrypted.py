"""EncryptedTier: a disk tier whose pages are encrypted."""

import logging

import numpy as np

from octavo.formats.page_cipher import PageCipher, Tampered

from .disk import DiskTier

_log = logging.getLogger("octavo")


class EncryptedTier:
    """A Tier that stores encrypted pages in a DiskTier, under names that say nothing about them.

    Pages that were written with another key have other names, so they are not found. A page that was changed, or put in
    the place of another one, counts as lost, and it is deleted.

    Args:
        disk: stores pages that are larger by OVERHEAD.

    Attributes:
        refused: number of pages that were changed on disk.
    """

    name = "disk"

    def __init__(self, disk: DiskTier, cipher: PageCipher):
        self._disk, self._cipher = disk, cipher
        self.refused = 0

    def __contains__(self, key: bytes) -> bool:
        return self._cipher.name(key) in self._disk

    def read(self, key: bytes) -> np.ndarray | None:
        name = self._cipher.name(key)
        if (sealed := self._disk.read(name)) is None:
            return None
        try:
            return np.frombuffer(self._cipher.open(sealed.data, key), np.uint8)
        except Tampered:
            if not self.refused:
                _log.warning("kv_disk: a page was changed by someone else; it is computed again")
            self.refused += 1
            self._disk.discard(name)
            return None

    def write(self, key: bytes, content: np.ndarray) -> bool:
        if self.touch(key):
            return True
        sealed = self._cipher.seal(content.data, key)
        return self._disk.write(self._cipher.name(key), np.frombuffer(sealed, np.uint8))

    def touch(self, key: bytes) -> bool:
        return self._disk.touch(self._cipher.name(key))

    def close(self) -> None:
        self._disk.close()
