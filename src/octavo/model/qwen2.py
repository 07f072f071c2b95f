"""Qwen2 and Qwen2.5: a Llama with biases on q, k and v, and optional sliding windows in its upper layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.errors import DamagedWeights

from . import llama
from .config_values import integer
from .llama import WEIGHTS
from .spec import DecoderSpec

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "WEIGHTS", "spec", "windows"]
ARCHITECTURE, MODEL_TYPE = "Qwen2ForCausalLM", "qwen2"


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises DamagedWeights or UnsupportedModel."""
    base = llama.spec(config)
    return replace(base, windows=windows(config, base.num_layers), qkv_bias=True, output_bias=False, mlp_bias=False)


def windows(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Which layers see a window only: as `layer_types` (transformers 5) says, else from `max_window_layers` up."""
    if not config.get("use_sliding_window"):
        return (0,) * num_layers
    window = integer(config, "sliding_window", 4096)
    if (types := config.get("layer_types")) is not None:
        if len(types) != num_layers or not {*types} <= {"full_attention", "sliding_attention"}:
            raise DamagedWeights(f"the model's config has layer_types that do not suit its {num_layers} layers")
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    first = config.get("max_window_layers", 28)
    return tuple(window if i >= first else 0 for i in range(num_layers))
