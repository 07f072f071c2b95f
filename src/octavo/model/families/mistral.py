"""Mistral: a Llama whose layers may all attend to a sliding window only."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.model.config_values import integer
from octavo.model.spec import DecoderSpec

from . import llama
from .llama import WEIGHTS

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "WEIGHTS", "spec"]
ARCHITECTURE, MODEL_TYPE = "MistralForCausalLM", "mistral"


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises DamagedWeights or UnsupportedModel."""
    base = llama.spec(config)
    # A null window is none; an absent one is what MistralConfig has by default.
    window = integer(config, "sliding_window") if config.get("sliding_window", 4096) is not None else 0
    return replace(base, windows=(window,) * base.num_layers)
