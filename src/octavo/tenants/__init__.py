"""API keys: whose a request is, and what its owner may do."""

from .key import Key, new_secret, secret_hash
from .key_file import read_keys
from .key_ring import KeyRing

__all__ = ["Key", "KeyRing", "new_secret", "read_keys", "secret_hash"]
