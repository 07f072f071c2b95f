"""A .gguf file as a Hugging Face checkpoint: its metadata as a config.json, its tensors under Hugging Face names."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import DamagedWeights, UnsupportedModel
from octavo.formats.gguf import GgufTensor, read_header

from .tensor import Tensor, mapped_tensor

# GGUF architecture -> Hugging Face model_type. Mistral is written as "llama".
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


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of `path`, mapped. Raises ModelNotFound, DamagedWeights or UnsupportedModel."""
    header = read_header(path)
    infos = {info.name: info for info in header.tensors}
    if header.metadata.get("split.count", 1) != 1:
        raise UnsupportedModel(f"{path} is one part of a split GGUF; merge the parts with llama-gguf-split --merge")

    def mapped(info: GgufTensor, name: str) -> Tensor:
        return mapped_tensor(header.mapped, info.start, info.stop, name, info.shape, info.format)

    config = _config(path, header.metadata, infos)
    if "rope_freqs.weight" in infos:  # how GGUF spells Llama 3's scaling: the divisor of each frequency
        if infos["rope_freqs.weight"].format != "F32":
            raise DamagedWeights(f"{path}: rope_freqs.weight is not F32; download it again")
        factors = mapped(infos["rope_freqs.weight"], "").float32()
        config["rope_parameters"] |= {"rope_type": "factors", "factors": factors.tolist()}

    tensors: dict[str, Tensor] = {}
    for info in header.tensors:
        name = _hugging_face_name(info.name)
        tensor = mapped(info, name)
        if header.metadata["general.architecture"] == "llama":
            tensor = replace(tensor, row_order=_row_order(path, tensor, config))
        tensors[name] = tensor
    return config, tensors


def _config(path: Path, metadata: dict[str, Any], infos: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a GGUF header, plus rope_type "factors", which only GGUF files have."""
    architecture = str(metadata.get("general.architecture"))
    if architecture not in _MODEL_TYPES:
        supported = ", ".join(_MODEL_TYPES)
        raise UnsupportedModel(f"{path} has architecture {architecture!r}; supported in GGUF are {supported}")

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    if get("expert_count"):
        raise UnsupportedModel(f"{path} is a mixture of experts, which is not supported")
    config: dict[str, Any] = {"model_type": _MODEL_TYPES[architecture]}
    config |= {hf: get(key) for key, hf in _CONFIG_KEYS.items() if get(key) is not None}
    if (window := get("attention.sliding_window")) and architecture == "llama":
        config |= {"model_type": "mistral", "sliding_window": window}
    if (head_dim := get("attention.key_length", get("rope.dimension_count"))) is not None:
        config["head_dim"] = head_dim
    if any(get(key, head_dim) != head_dim for key in ("attention.value_length", "rope.dimension_count")):
        raise UnsupportedModel(f"{path} rotates part of a head or has values of another size, which is not supported")
    if "token_embd.weight" not in infos:
        raise DamagedWeights(f"{path} has no tensor token_embd.weight; download it again")
    scaling, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", 1.0)
    return config | {
        "vocab_size": infos["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in infos,
        "attention_bias": "blk.0.attn_output.bias" in infos,
        "mlp_bias": "blk.0.ffn_down.bias" in infos,
        "rope_parameters": {"rope_type": scaling, "factor": factor, "rope_theta": get("rope.freq_base", 10000.0)},
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }


def _hugging_face_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that no model of ours uses stays as it is."""
    match = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    layer = match[1].replace("blk.", "model.layers.") if match[1] else ""
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"


def _row_order(path: Path, tensor: Tensor, config: dict[str, Any]) -> np.ndarray | None:
    """Where the rows of q and k lie. GGUF stores the rotary pairs (i, i + dim/2) of a Llama's head side by side."""
    match = re.search(r"self_attn\.([qk])_proj", tensor.name)
    if match is None:
        return None
    heads = config.get("num_attention_heads" if match[1] == "q" else "num_key_value_heads")
    rows = tensor.shape[0]
    if not isinstance(heads, int) or heads <= 0 or rows % (2 * heads):
        raise DamagedWeights(f"{path}: {tensor.name} has {rows} rows for {heads} heads; download it again")
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
