"""Read the rotary embedding of a config.json of any version, and the context length that its scaling allows."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from octavo.errors import DamagedWeights, UnsupportedModel, shortened

from .config_values import MAX_INT32, integer, number, table
from .spec import RopeSpec


def rope_spec(config: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (earlier versions).

    The rope_type "factors", with a list `factors` of head_dim / 2 divisors, is Octavo's own: .gguf files have them.
    Raises UnsupportedModel for other scalings than linear and llama3, DamagedWeights for invalid values.
    """
    values = _values(config)
    theta = number(values, "rope_theta", 10000.0)
    match kind := _kind(values):
        case "default":
            factors: tuple[float, ...] = ()
        case "linear":
            factors = (number(values, "factor"),) * (head_dim // 2)
        case "llama3":
            factors = _llama3_factors(config, values, RopeSpec(theta).frequencies(head_dim))
        case "factors":
            factors = _given_factors(values)
        case _:
            found = shortened(repr(kind))
            raise UnsupportedModel(f"rope scaling {found} is not supported; supported are linear and llama3")
    if factors and len(factors) != head_dim // 2:
        raise DamagedWeights(f"the model has {len(factors)} rope factors; heads of {head_dim} need {head_dim // 2}")
    return RopeSpec(theta, factors)


def max_positions(config: Mapping[str, Any], default: int) -> int:
    """Return the maximum number of tokens in a sequence: max_position_embeddings, times the factor of linear scaling.

    This is vLLM's rule. Other scalings do not extend max_position_embeddings (llama3) or are not supported.
    Raises DamagedWeights.
    """
    positions = integer(config, "max_position_embeddings", default)
    values = _values(config)
    if _kind(values) != "linear":
        return positions
    return max(1, min(int(positions * number(values, "factor")), MAX_INT32))


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the rotary embedding, wherever the config has them. Raises UnsupportedModel."""
    # If a config has both, only rope_scaling counts, as in transformers.
    scaling = table(config, "rope_scaling") or table(config, "rope_parameters")
    values = {"rope_theta": config.get("rope_theta"), **scaling}
    if nested := [key for key, value in values.items() if isinstance(value, Mapping)]:
        raise UnsupportedModel(
            f"a rotary embedding that differs from layer to layer ({shortened(nested[0])}) is not supported"
        )
    if values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise UnsupportedModel("a rotary embedding of part of each head (partial_rotary_factor) is not supported")
    return values


def _kind(values: Mapping[str, Any]) -> Any:
    """Return the type of scaling. Raises DamagedWeights for a factor without a type, which would be ambiguous."""
    kind = values.get("rope_type", values.get("type"))
    if kind is None and values.get("factor", 1.0) != 1.0:
        raise DamagedWeights("the model's rope_scaling has a factor but no rope_type; add one, such as linear")
    return "default" if kind is None else kind


def _given_factors(values: Mapping[str, Any]) -> tuple[float, ...]:
    factors = values.get("factors")
    if not isinstance(factors, list):
        found = shortened(repr(factors))
        raise DamagedWeights(f"the model has rope factors {found}; they must be a list of numbers")
    return tuple(number({"rope factor": factor}, "rope factor") for factor in factors)


def _llama3_factors(config: Mapping[str, Any], values: Mapping[str, Any], frequencies: np.ndarray) -> tuple[float, ...]:
    """Return the divisors of Llama 3.1's scaling.

    With t = turns of a pair in the original context, low = low_freq_factor and high = high_freq_factor:
    1 / divisor = kept + (1 - kept) / factor, where kept = (t - low) / (high - low), clipped to 0 ... 1.
    """
    factor, low, high = (number(values, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise DamagedWeights(
            f"the model's config has high_freq_factor = {high}; it must be above low_freq_factor = {low}"
        )
    key = "original_max_position_embeddings"
    context = number({key: config.get(key, values.get(key, config.get("max_position_embeddings")))}, key)
    turns = context * frequencies.astype(np.float64) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple((1.0 / (kept + (1.0 - kept) / factor)).tolist())
