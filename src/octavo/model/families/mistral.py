"""Mistral: Llama without biases, where all layers may attend to a sliding window."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.model.config_values import integer
from octavo.model.spec import DecoderSpec

from . import llama
from .llama import WEIGHTS

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "WEIGHTS", "spec"]
ARCHITECTURE, MODEL_TYPE = "MistralForCausalLM", "mistral"
_DEFAULTS = llama.Defaults(max_positions=131072, num_kv_heads=8)
_WINDOW = 4096  # the default if config.json lacks the key; null means no window


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Return the DecoderSpec of a config.json. Raises DamagedWeights or UnsupportedModel."""
    base = llama.spec(config, _DEFAULTS)
    window = 0 if config.get("sliding_window", _WINDOW) is None else integer(config, "sliding_window", _WINDOW)
    return replace(base, windows=(window,) * base.num_layers, qkv_bias=False, output_bias=False, mlp_bias=False)
