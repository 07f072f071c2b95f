"""A .gguf file read as a Hugging Face checkpoint: its metadata as a config.json, its tensors by Hugging Face names.

The meaning of keys, and the defaults of absent ones, are those of llama.cpp (src/llama-model.cpp, load_hparams).
"""

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np

from octavo.errors import DamagedWeights, UnsupportedModel, shortened
from octavo.formats.files import ModelPath
from octavo.formats.gguf import GgufTensor, read_header

from .tensor import Tensor, mapped_tensor

# GGUF architecture: Hugging Face model_type. Files of Mistral models have the architecture "llama".
_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}

_OPTIONAL = {"attention.head_count_kv"}  # of _CONFIG_KEYS
_NEUTRAL = {"attention.causal": True, "attention.scale": 0.0, "rope.scaling.attn_factor": 1.0, "expert_count": 0}
_OTHER_KEYS = {
    "attention.key_length",
    "attention.sliding_window",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.type",
}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(path: ModelPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Map the weights of the file at `path`.

    Returns:
        The keys and values of a config.json, and the tensors by Hugging Face name. The config may have the rope_type
        "factors", which only GGUF files have (see model/rope.py).

    Raises:
        ModelNotFound: There is no such file, or it cannot be read.
        DamagedWeights: The file is truncated or inconsistent, or lacks a required key.
        UnsupportedModel: The model is of an architecture or variant that Octavo does not run.
    """
    header = read_header(path)
    infos = {info.name: info for info in header.tensors}
    if header.metadata.get("split.count", 1) != 1:
        raise UnsupportedModel(f"{path} is one part of a split GGUF; merge the parts with llama-gguf-split --merge")

    def mapped(info: GgufTensor, name: str) -> Tensor:
        return mapped_tensor(header.mapped, info.start, info.stop, name, info.shape, info.format)

    config = _config(path, header.metadata, infos)
    if info := infos.get("rope_freqs.weight"):  # Llama 3's scaling: the divisor of each frequency
        if info.format != "F32" or len(info.shape) != 1:
            raise DamagedWeights(f"{path}: rope_freqs.weight is not a vector of F32; download it again")
        divisors = mapped(info, "").float32() * config["rope_parameters"].get("factor", 1.0)
        config["rope_parameters"] |= {"rope_type": "factors", "factors": divisors.tolist()}

    tensors: dict[str, Tensor] = {}
    for info in header.tensors:
        name = _hugging_face_name(info.name)
        if name in tensors:
            raise DamagedWeights(f"{path} has two tensors named {shortened(repr(name))}; download it again")
        tensor = mapped(info, name)
        if header.metadata["general.architecture"] == "llama":
            tensor = replace(tensor, row_order=_row_order(path, tensor, config))
        tensors[name] = tensor
    return config, tensors


def _config(path: ModelPath, metadata: dict[str, Any], infos: dict[str, GgufTensor]) -> dict[str, Any]:
    """Translate the metadata to the keys and values of a config.json."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _MODEL_TYPES:
        found, supported = shortened(repr(architecture)), ", ".join(_MODEL_TYPES)
        raise UnsupportedModel(f"{path} has architecture {found}; supported in GGUF are {supported}")
    prefix = f"{architecture}."
    num_layers = metadata.get(f"{prefix}block_count")
    keys = {
        key: _scalar(path, key, metadata[prefix + key], num_layers)
        for key in _CONFIG_KEYS.keys() | _NEUTRAL.keys() | _OTHER_KEYS
        if prefix + key in metadata
    }
    _refuse_variants(path, keys)
    config: dict[str, Any] = {"model_type": _MODEL_TYPES[architecture]}
    for key, name in _CONFIG_KEYS.items():
        if key not in keys and key not in _OPTIONAL:
            raise DamagedWeights(f"{path} has no {prefix}{key}; download it again, or convert the model again")
        config[name] = keys.get(key)
    if (window := keys.get("attention.sliding_window")) and architecture == "llama":
        config |= {"model_type": "mistral", "sliding_window": window}
    if "token_embd.weight" not in infos:
        raise DamagedWeights(f"{path} has no tensor token_embd.weight; download it again")
    return config | {
        "head_dim": _head_dim(path, keys, config),
        "vocab_size": infos["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in infos,
        "attention_bias": "blk.0.attn_output.bias" in infos,
        "mlp_bias": "blk.0.ffn_down.bias" in infos,
        "rope_parameters": _rope_parameters(path, keys),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }


def _scalar(path: ModelPath, key: str, value: Any, num_layers: Any) -> Any:
    """Return the value of a key. For an array with one value per layer, return the value that all layers share.

    Raises UnsupportedModel if layers differ.
    """
    if not isinstance(value, list):
        return value
    if len(value) == num_layers and value and all(item == value[0] for item in value):
        return value[0]
    raise UnsupportedModel(f"{path} has {shortened(key)} = {shortened(value)}, which differs from layer to layer")


def _refuse_variants(path: ModelPath, keys: dict[str, Any]) -> None:
    """Raise UnsupportedModel for keys that change what a model computes in a way that Octavo does not support."""
    for key, value in _NEUTRAL.items():
        if keys.get(key, value) != value:
            raise UnsupportedModel(f"{path} has {key} = {shortened(keys[key])}, which is not supported")


def _head_dim(path: ModelPath, keys: dict[str, Any], config: dict[str, Any]) -> Any:
    """Return the size of a head. Raises UnsupportedModel if it is not the same for keys, values and rotation."""
    hidden_size, heads = config["hidden_size"], config["num_attention_heads"]
    default = hidden_size // heads if type(hidden_size) is int and type(heads) is int and heads > 0 else None
    head_dim = keys.get("attention.key_length", default)
    if any(keys.get(key, head_dim) != head_dim for key in ("attention.value_length", "rope.dimension_count")):
        raise UnsupportedModel(f"{path} rotates part of a head or has values of another size, which is not supported")
    return head_dim


def _rope_parameters(path: ModelPath, keys: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding in the form of config.json. A factor without a type means linear scaling."""
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
    if factor == 0 or kind == "none":
        factor = 1.0
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not math.isfinite(factor):
        raise DamagedWeights(f"{path} has a rope scaling factor of {shortened(repr(factor))}; download it again")
    parameters = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    if kind not in ("none", "linear"):
        return parameters | {"rope_type": kind}
    return parameters | ({"rope_type": "linear", "factor": factor} if factor != 1 else {})


def _hugging_face_name(name: str) -> str:
    """Return the Hugging Face name of a GGUF tensor. Names of unknown tensors are returned unchanged."""
    match = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    layer = match[1].replace("blk.", "model.layers.") if match[1] else ""
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"


def _row_order(path: ModelPath, tensor: Tensor, config: dict[str, Any]) -> np.ndarray | None:
    """Return Tensor.row_order, which is not None for the q and k projections of Llama.

    GGUF files store the rows of each rotary pair (i, i + head_dim / 2) side by side.
    """
    match = re.search(r"self_attn\.([qk])_proj", tensor.name)
    if match is None:
        return None
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    heads = heads if match[1] == "q" or kv_heads is None else kv_heads
    rows = tensor.shape[0]
    if type(heads) is not int or heads <= 0 or rows % (2 * heads):
        raise DamagedWeights(
            f"{path}: {shortened(tensor.name)} has {rows} rows for {shortened(heads)} heads; download it again"
        )
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
