"""Values of a config.json, checked: a wrong one is a one-line error, not a failure somewhere in a kernel."""

import math
from collections.abc import Mapping
from typing import Any

from octavo.errors import DamagedWeights

_LARGEST = 2**31 - 1


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer; `default` if it is absent or null. Raises DamagedWeights."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST:
        raise DamagedWeights(f"the model's config has {key} = {value!r}; it must be a positive integer")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; `default` if it is absent or null. Raises DamagedWeights."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise DamagedWeights(f"the model's config has {key} = {value!r}; it must be a positive number")
    return float(value)
