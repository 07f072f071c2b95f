"""Llama 2 and 3.x, and models of their shape such as SmolLM2; the names and sizes that later families start from."""

from collections.abc import Mapping
from typing import Any, Literal

from octavo.errors import DamagedWeights, UnsupportedModel
from octavo.model.config_values import integer, number
from octavo.model.rope import rope_spec
from octavo.model.spec import DecoderSpec

ARCHITECTURE, MODEL_TYPE = "LlamaForCausalLM", "llama"

# Canonical name (see decoder.py) -> the tensors stacked in it.
WEIGHTS: dict[str, tuple[str, ...]] = {
    "embed": ("model.embed_tokens.weight",),
    "layers.{i}.attn_norm": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.qkv": tuple(f"model.layers.{{i}}.self_attn.{part}_proj.weight" for part in "qkv"),
    "layers.{i}.qkv.bias": tuple(f"model.layers.{{i}}.self_attn.{part}_proj.bias" for part in "qkv"),
    "layers.{i}.q_norm": ("model.layers.{i}.self_attn.q_norm.weight",),
    "layers.{i}.k_norm": ("model.layers.{i}.self_attn.k_norm.weight",),
    "layers.{i}.out": ("model.layers.{i}.self_attn.o_proj.weight",),
    "layers.{i}.out.bias": ("model.layers.{i}.self_attn.o_proj.bias",),
    "layers.{i}.mlp_norm": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.gate_up": ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
    "layers.{i}.gate_up.bias": ("model.layers.{i}.mlp.gate_proj.bias", "model.layers.{i}.mlp.up_proj.bias"),
    "layers.{i}.down": ("model.layers.{i}.mlp.down_proj.weight",),
    "layers.{i}.down.bias": ("model.layers.{i}.mlp.down_proj.bias",),
    "norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
}

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises DamagedWeights for values that make no sense, UnsupportedModel for variants that Octavo does not run."""
    hidden_size, num_heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    head_dim = integer(config, "head_dim", hidden_size // num_heads, most=8192)
    num_kv_heads = integer(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise DamagedWeights(
            f"the model's config has {num_heads} heads of {head_dim} over {num_kv_heads} of keys and values"
        )
    activation = str(config.get("hidden_act", "silu"))
    if activation not in _ACTIVATIONS:
        raise UnsupportedModel(f"activation {activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    attention_bias = bool(config.get("attention_bias"))
    num_layers = integer(config, "num_hidden_layers", most=1000)
    return DecoderSpec(
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=integer(config, "max_position_embeddings", 2048),
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope=rope_spec(config, head_dim),
        windows=(0,) * num_layers,
        activation=_ACTIVATIONS[activation],
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias")),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
    )
