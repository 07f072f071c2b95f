"""Tiers: stores of KV pages below the pool, in host memory or on disk."""
