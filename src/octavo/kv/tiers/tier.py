"""A store of pages below the pool."""

from typing import Protocol

import numpy as np


class Tier(Protocol):
    """Pages by key. It may lose any of them at any time: a page can always be computed again. From any thread."""

    name: str

    def __contains__(self, key: bytes) -> bool:
        """Whether `read` is likely to give the page. O(1), without I/O."""
        ...

    def read(self, key: bytes) -> np.ndarray | None:
        """Content, uint8 [page_bytes], not to be written to; it may block. None: lost or damaged, and now forgotten."""
        ...

    def write(self, key: bytes, content: np.ndarray) -> bool:
        """Keep a page, and forget the least recently used ones if there is no room; it may block. False: could not."""
        ...

    def touch(self, key: bytes) -> bool:
        """The page is in use elsewhere, as if it were read; it may block. False: it is not here."""
        ...

    def close(self) -> None: ...
