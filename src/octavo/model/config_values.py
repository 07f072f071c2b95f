"""Values of a config.json, checked: a wrong one is a one-line error, not a failure somewhere in a kernel."""

from collections.abc import Mapping
from typing import Any

from octavo.errors import DamagedWeights


def integer(config: Mapping[str, Any], key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
    """An integer from 1 to `most`; `default` if it is absent or null. Raises DamagedWeights."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise DamagedWeights(f"the model's config has {key} = {value!r}; it must be an integer from 1 to {most:,}")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number from 1e-12 to 1e12; `default` if it is absent or null. Raises DamagedWeights."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-12 <= value <= 1e12:
        raise DamagedWeights(f"the model's config has {key} = {value!r}; it must be a number from 1e-12 to 1e12")
    return float(value)


def table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A JSON object; an empty one if it is absent or null. Raises DamagedWeights."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise DamagedWeights(f"the model's config has {key} = {value!r}; it must be an object")
    return value or {}
