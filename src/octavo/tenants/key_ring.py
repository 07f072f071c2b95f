"""KeyRing: finds the key of a secret, and follows changes of the file of keys."""

import hmac
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from octavo.follow import follow

from .key import Key, secret_hash
from .key_file import read_keys


class KeyRing:
    """The keys that a server accepts.

    A secret is found by its hash, so the time that this takes tells nothing of the secrets that exist.

    Args:
        secrets: of keys without limits, whose clients may name a tenant.
        path: a file of keys, which is read again after each change. While it is wrong, the last right one applies.

    Raises:
        ConfigError: The file is wrong.
    """

    def __init__(self, secrets: Sequence[str] = (), path: Path | None = None):
        self._plain = {
            hash: Key(name=f"api-key-{n}", hash=hash, names_tenants=True)
            for n, hash in enumerate(map(secret_hash, secrets), 1)
        }
        self._keys = self._plain
        if path is not None:
            follow([path], partial(self._read, path), "list of keys")

    def find(self, secret: str) -> Key | None:
        """Return the key with this secret; None if there is none."""
        wanted = secret_hash(secret)
        key = self._keys.get(wanted)
        return key if key is not None and hmac.compare_digest(key.hash, wanted) else None

    @property
    def keys(self) -> list[Key]:
        """Return all keys."""
        return list(self._keys.values())

    def _read(self, path: Path) -> None:
        self._keys = self._plain | _by_hash(read_keys(path))


def _by_hash(keys: Sequence[Key]) -> dict[str, Key]:
    """Return keys by their hashes. Each has the weight of its tenant, which another key of the tenant may give."""
    weights = {key.owner: key.weight for key in keys if key.weight is not None}
    return {
        key.hash: replace(key, weight=weights[key.owner]) if key.owner in weights and not key.names_tenants else key
        for key in keys
    }
