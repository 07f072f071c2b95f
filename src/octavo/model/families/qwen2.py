"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and optionally with sliding windows in the upper layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.errors import DamagedWeights, UnsupportedModel, shortened
from octavo.model.config_values import flag, integer
from octavo.model.spec import DecoderSpec

from . import llama
from .llama import WEIGHTS

__all__ = ["ARCHITECTURE", "DEFAULTS", "MODEL_TYPE", "WEIGHTS", "spec", "windows"]
ARCHITECTURE, MODEL_TYPE = "Qwen2ForCausalLM", "qwen2"
DEFAULTS = llama.Defaults(max_positions=32768, num_kv_heads=32)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Return the DecoderSpec of a config.json. Raises DamagedWeights or UnsupportedModel."""
    base = llama.spec(config, DEFAULTS)
    return replace(base, windows=windows(config, base.num_layers), qkv_bias=True, output_bias=False, mlp_bias=False)


def windows(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return the window of each layer, 0 for none.

    Layers with a window are those that `layer_types` (transformers 5) lists; without it, all from `max_window_layers`
    up. Raises DamagedWeights or UnsupportedModel.
    """
    if not flag(config, "use_sliding_window") or config.get("sliding_window", 4096) is None:
        return (0,) * num_layers
    window = integer(config, "sliding_window", 4096)
    if (types := config.get("layer_types")) is None:
        first = integer(config, "max_window_layers", 28) if config.get("max_window_layers") != 0 else 0
        return tuple(window if i >= first else 0 for i in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise DamagedWeights(f"the model's config has layer_types that do not fit its {num_layers} layers")
    kinds = {"full_attention": 0, "sliding_attention": window}
    if unknown := [kind for kind in types if str(kind) not in kinds]:
        raise UnsupportedModel(
            f"layers of type {shortened(repr(unknown[0]))} are not supported; supported are {', '.join(kinds)}"
        )
    return tuple(kinds[kind] for kind in types)
