"""The paged KV cache: page pool, page tables, prefix index, and tiers below the pool."""

from .cache import KVCache, PageTable, Prefetch, pages_for
from .page_pool import PagePool
from .prefix import Prefix, page_keys, root_key
from .transfers import Transfers

__all__ = ["KVCache", "PagePool", "PageTable", "Prefetch", "Prefix", "Transfers", "page_keys", "pages_for", "root_key"]
