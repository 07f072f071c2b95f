"""Qwen3: Qwen2 with RMS norms on each head's queries and keys instead of biases."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.model.config_values import integer
from octavo.model.spec import DecoderSpec

from . import llama
from .llama import WEIGHTS
from .qwen2 import DEFAULTS, windows

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "WEIGHTS", "spec"]
ARCHITECTURE, MODEL_TYPE = "Qwen3ForCausalLM", "qwen3"


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Return the DecoderSpec of a config.json. Raises DamagedWeights or UnsupportedModel."""
    base = llama.spec({**config, "head_dim": integer(config, "head_dim", 128)}, DEFAULTS)
    return replace(base, windows=windows(config, base.num_layers), qk_norm=True, mlp_bias=False)
