"""Writes a Hugging Face directory as the .gguf file that llama.cpp's converter would make of it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

QUANTISABLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]  # which the gguf package can read but not make


def write_gguf(
    source: Path, target: Path, format: str = "F32", edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None
) -> dict[str, np.ndarray]:
    """Write matrices in `format`, the rest in F32; `edit` may change the keys before the file is written.

    Returns what was written: Hugging Face names and order, dequantized.
    """
    config = json.loads((source / "config.json").read_text())
    arch = "llama" if config["model_type"] == "mistral" else config["model_type"]
    rope = config["rope_parameters"]
    writer = gguf.GGUFWriter(target, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if arch == "llama":
        writer.add_rope_dimension_count(head_dim)
    if config["model_type"] == "mistral":
        writer.add_sliding_window(config["sliding_window"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(rope, head_dim))

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    written = {}
    rng = np.random.default_rng(0)
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            values = tensor.to(torch.float32).numpy()
            kind = gguf.GGMLQuantizationType[format if values.ndim == 2 else "F32"]
            data = _random_blocks(rng, values.shape, kind) if kind.name in K_QUANTS else gguf.quantize(values, kind)
            written[name] = gguf.dequantize(data, kind)
            if arch == "llama" and (match := re.search(r"self_attn\.([qk])_proj", name)):
                data = _interleave_pairs(data, heads[match[1]])
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=kind)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _interleave_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _llama3_divisors(rope: dict[str, float], head_dim: int) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py computes rope_freqs."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        context = rope["original_max_position_embeddings"]
        if wavelength < context / rope["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > context / rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def _random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Valid blocks of random numbers, none of them wild: the scales, wherever a block has them, are made small."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, gguf.quant_shape_to_byte_shape(shape, kind), np.uint8)
    blocks = data.reshape(-1, block_bytes)
    scale = np.array([0.001], np.float16).view(np.uint8)
    at = {"Q2_K": (-4, -2), "Q3_K": (-2,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (-2,)}[kind.name]
    for byte in at:
        blocks[:, [byte, byte + 1]] = scale
    return data


def finish_vocabulary(writer: gguf.GGUFWriter, **flags: bool) -> Path:
    """Complete a .gguf that has a vocabulary and no tensors; `flags` are booleans of tokenizer.ggml."""
    for key, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    assert writer.path is not None
    return Path(writer.path)
