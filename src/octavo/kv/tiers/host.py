"""HostTier: a tier of pages in host memory, below a device's pool."""

from collections import OrderedDict
from threading import Lock

import numpy as np


class HostTier:
    """A Tier of copies of pages in host memory, with at most `capacity_bytes` together."""

    name = "host"
    refused = 0

    def __init__(self, capacity_bytes: int):
        self._capacity = capacity_bytes
        self._lock = Lock()
        self._pages: OrderedDict[bytes, np.ndarray] = OrderedDict()  # least recently used first
        self._used = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._pages

    def read(self, key: bytes) -> np.ndarray | None:
        return self._pages.get(key) if self.touch(key) else None

    def write(self, key: bytes, content: np.ndarray) -> bool:
        if self.touch(key):
            return True
        if content.nbytes > self._capacity:
            return False
        copy = content.copy()
        copy.flags.writeable = False
        with self._lock:
            if key not in self._pages:
                self._pages[key] = copy
                self._used += copy.nbytes
            while self._used > self._capacity:
                self._used -= self._pages.popitem(last=False)[1].nbytes
        return True

    def touch(self, key: bytes) -> bool:
        with self._lock:
            if key not in self._pages:
                return False
            self._pages.move_to_end(key)
            return True

    def close(self) -> None:
        with self._lock:
            self._pages.clear()
            self._used = 0
