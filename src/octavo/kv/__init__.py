"""Paged KV cache: pool, page tables, prefix index, tiers below the pool."""

from .cache import KVCache, Prefetch, SequencePages
from .page_pool import PagePool
from .prefix import Prefix, root_key
from .transfers import Transfers

__all__ = ["KVCache", "PagePool", "Prefetch", "Prefix", "SequencePages", "Transfers", "root_key"]
