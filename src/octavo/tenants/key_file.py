"""Read and change a YAML file of API keys. Changes are atomic: a reader sees the file before or after one."""

import contextlib
import dataclasses
import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from octavo.errors import ConfigError

from .key import Key, new_secret, secret_hash

MAX_BYTES = 4 << 20  # of a file
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_HEAD = "# API keys of an Octavo server, changed by `octavo keys`. Secrets are hashed: a lost key must be rotated.\n"


def read_keys(path: Path) -> list[Key]:
    """Return the keys in a file.

    Raises:
        ConfigError: The file cannot be read, or a key is wrong; the message names the file and the key.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: a file of keys may have at most {MAX_BYTES >> 20} MiB")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"the keys in {path} cannot be read: {reason}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    entries = content.get("keys") if isinstance(content, dict) and set(content) == {"keys"} else None
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: a file of keys has a list named keys, and nothing else")
    keys = [_key(path, number, entry) for number, entry in enumerate(entries, 1)]
    for field in ("name", "hash"):
        values = [getattr(key, field) for key in keys]
        if len(set(values)) < len(values):
            twice = next(key.name for key in keys if values.count(getattr(key, field)) > 1)
            raise ConfigError(f"{path}: two keys have the {field} of the key {twice!r}")
    weights: dict[str, float] = {}
    for key in keys:
        if key.weight is not None and weights.setdefault(key.owner, key.weight) != key.weight:
            raise ConfigError(f"{path}: the keys of the tenant {key.owner!r} have different weights: give only one")
    return keys


def add_key(path: Path, **fields: Any) -> str:
    """Add a key, and return its secret, which is not stored. The file is made if there is none.

    Args:
        fields: those of Key, without `hash`.

    Raises:
        ConfigError: A field is wrong, or there is a key of this name.
    """
    secret = new_secret()
    with _changing(path) as keys:
        key = Key(**fields, hash=secret_hash(secret))
        if any(each.name == key.name for each in keys):
            raise ConfigError(f"{path} has a key named {key.name!r} already: choose another name, or rotate it")
        keys.append(key)
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Remove a key. Raises ConfigError if there is none of this name."""
    with _changing(path) as keys:
        keys.remove(_named(path, keys, name))


def rotate_key(path: Path, name: str) -> str:
    """Give a key a new secret and return it; the old one is refused. Raises ConfigError if there is no such key."""
    secret = new_secret()
    with _changing(path) as keys:
        at = keys.index(_named(path, keys, name))
        keys[at] = dataclasses.replace(keys[at], hash=secret_hash(secret))
    return secret


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """Lock a file of keys, yield its keys for changes, and write them."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = read_keys(path) if path.exists() else []
            yield keys
            _write(path, keys)
    except OSError as error:
        raise ConfigError(f"the keys in {path} cannot be changed: {error.strerror or error}") from None


def _write(path: Path, keys: Sequence[Key]) -> None:
    entries = [
        {name: value for name, value in dataclasses.asdict(key).items() if value is not None and value is not False}
        for key in keys
    ]
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # for the owner only
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(_HEAD)
            yaml.safe_dump({"keys": entries}, file, sort_keys=False, allow_unicode=True)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            Path(name).chmod(path.stat().st_mode & 0o777)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


def _named(path: Path, keys: Sequence[Key], name: str) -> Key:
    for key in keys:
        if key.name == name:
            return key
    names = ", ".join(key.name for key in keys[:20])
    raise ConfigError(f"{path} has no key named {name!r}; it has {names or 'none'}")


def _key(path: Path, number: int, entry: Any) -> Key:
    known = {field.name for field in dataclasses.fields(Key)}
    where = f"{path}: key {number}"
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} should be a mapping of {', '.join(sorted(known))}")
    if unknown := [str(name) for name in entry if name not in known]:
        raise ConfigError(f"{where} has an unknown field {unknown[0]}; the fields are {', '.join(sorted(known))}")
    values: dict[str, Any] = dict(entry)
    if values.get("expires") is not None:
        values["expires"] = str(values["expires"])  # YAML reads a date as such
    try:
        return Key(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
