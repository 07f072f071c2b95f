"""Paged KV cache: pool, page tables, prefix index."""

from .cache import KVCache, SequencePages
from .page_pool import PagePool

__all__ = ["KVCache", "PagePool", "SequencePages"]
