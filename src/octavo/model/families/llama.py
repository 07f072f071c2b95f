"""Llama 2 and 3.x, and models of the same architecture such as SmolLM2. Other families are derived from this one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from octavo.errors import DamagedWeights, UnsupportedModel, shortened
from octavo.model.config_values import flag, integer, number
from octavo.model.rope import max_positions, rope_spec
from octavo.model.spec import DecoderSpec

ARCHITECTURE, MODEL_TYPE = "LlamaForCausalLM", "llama"

# By canonical name (see decoder.py): the tensors that are stacked in a parameter.
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


@dataclass(frozen=True)
class Defaults:
    """Defaults for keys that config.json lacks, from the family's configuration class in transformers.

    `num_kv_heads` None means as many as query heads, as does an explicit null in config.json.
    """

    max_positions: int = 2048
    num_kv_heads: int | None = None


def spec(config: Mapping[str, Any], defaults: Defaults = Defaults()) -> DecoderSpec:
    """Return the DecoderSpec of a config.json.

    Raises:
        DamagedWeights: A value is missing or invalid.
        UnsupportedModel: The config describes a variant that Octavo does not run.
    """
    hidden_size, num_heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    head_dim = integer(config, "head_dim", hidden_size // num_heads, most=8192)
    kv_heads_by_default = defaults.num_kv_heads if "num_key_value_heads" not in config else None
    num_kv_heads = integer(config, "num_key_value_heads", kv_heads_by_default or num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise DamagedWeights(
            f"the model's config has {num_heads} heads of {head_dim} over {num_kv_heads} of keys and values"
        )
    activation = config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        found = shortened(repr(activation))
        raise UnsupportedModel(f"activation {found} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    attention_bias = flag(config, "attention_bias")
    num_layers = integer(config, "num_hidden_layers", most=1000)
    return DecoderSpec(
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=max_positions(config, defaults.max_positions),
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope=rope_spec(config, head_dim),
        windows=(0,) * num_layers,
        activation=_ACTIVATIONS[activation],
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias"),
        tied_embeddings=flag(config, "tie_word_embeddings"),
    )
