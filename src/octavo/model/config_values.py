"""Read and check the values of a config.json, so that a wrong value is a one-line error, not a later kernel failure."""

from collections.abc import Mapping
from typing import Any

from octavo.errors import DamagedWeights, shortened

MAX_INT32 = 2**31 - 1


def integer(config: Mapping[str, Any], key: str, default: int | None = None, most: int = MAX_INT32) -> int:
    """Return an integer from 1 to `most`; `default` if it is absent or null. Raises DamagedWeights."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise _wrong(key, value, f"an integer from 1 to {most:,}")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a number from 1e-12 to 1e12; `default` if it is absent or null. Raises DamagedWeights."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-12 <= value <= 1e12:
        raise _wrong(key, value, "a number from 1e-12 to 1e12")
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """Return a boolean; False if it is absent or null. Raises DamagedWeights."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return bool(value)


def table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a JSON object; an empty one if it is absent or null. Raises DamagedWeights."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise _wrong(key, value, "an object")
    return value or {}


def _wrong(key: str, value: Any, right: str) -> DamagedWeights:
    return DamagedWeights(f"the model's config has {key} = {shortened(repr(value))}; it must be {right}")
