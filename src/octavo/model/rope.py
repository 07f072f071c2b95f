"""config.json's rotary embedding, of any age and scaling, as a RopeSpec."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from octavo.errors import DamagedWeights, UnsupportedModel

from .config_values import number, table
from .spec import RopeSpec


def rope_spec(config: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before). Raises UnsupportedModel.

    rope_type "factors", with the list `factors`, is Octavo's own: what a GGUF file holds.
    """
    values = {
        "rope_theta": config.get("rope_theta"),
        **table(config, "rope_scaling"),
        **table(config, "rope_parameters"),
    }
    theta = number(values, "rope_theta", 10000.0)
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel("a rotary embedding of part of each head (partial_rotary_factor) is not supported")
    match kind:
        case "default" | "none":
            factors: tuple[float, ...] = ()
        case "linear":
            factors = (number(values, "factor"),) * (head_dim // 2)
        case "llama3":
            factors = _llama3_factors(values, RopeSpec(theta).frequencies(head_dim))
        case "factors":
            factors = _given_factors(values)
        case _:
            raise UnsupportedModel(f"rope scaling {kind!r} is not supported; supported are linear and llama3")
    if factors and len(factors) != head_dim // 2:
        raise DamagedWeights(f"the model has {len(factors)} rope factors; heads of {head_dim} need {head_dim // 2}")
    return RopeSpec(theta, factors)


def _given_factors(values: Mapping[str, Any]) -> tuple[float, ...]:
    factors = values.get("factors")
    if not isinstance(factors, list):
        raise DamagedWeights(f"the model has rope factors {factors!r}; they must be a list of numbers")
    return tuple(number({"rope factor": factor}, "rope factor") for factor in factors)


def _llama3_factors(values: Mapping[str, Any], frequencies: np.ndarray) -> tuple[float, ...]:
    """Llama 3.1's scaling: divide frequencies that turn less than `low_freq_factor` times in the original context by
    `factor`, leave those that turn more than `high_freq_factor` times, and blend between the two."""
    factor, low, high = (number(values, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise DamagedWeights(
            f"the model's config has high_freq_factor = {high}; it must be above low_freq_factor = {low}"
        )
    turns = number(values, "original_max_position_embeddings") * frequencies.astype(np.float64) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple((1.0 / (kept + (1.0 - kept) / factor)).tolist())
