"""Tier: the protocol of a store of pages below the pool."""

from typing import Protocol

import numpy as np


class Tier(Protocol):
    """A store of pages by key. It may lose any page at any time, since pages can be recomputed. Thread-safe.

    Attributes:
        refused: number of pages that someone has changed, as far as this kind of store notices.
    """

    name: str
    refused: int

    def __contains__(self, key: bytes) -> bool:
        """Return whether `read` is likely to return the page. O(1), without I/O."""
        ...

    def read(self, key: bytes) -> np.ndarray | None:
        """Return the content of a page, uint8 [page_bytes], read-only. May block.

        None means that the page is lost or damaged. The tier no longer contains it.
        """
        ...

    def write(self, key: bytes, content: np.ndarray) -> bool:
        """Store a page, evicting the least recently used pages if necessary. May block.

        Returns False if the page could not be stored.
        """
        ...

    def touch(self, key: bytes) -> bool:
        """Mark a page as just used, without reading it. May block. Return False if the tier does not have it."""
        ...

    def close(self) -> None: ...
