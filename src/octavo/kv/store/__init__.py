"""A store of KV pages that several engines share, such as a Redis."""

from .store import Store, StoreRefused

__all__ = ["Store", "StoreRefused"]
