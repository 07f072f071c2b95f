"""AWQ and GPTQ checkpoints made from an ordinary one, packed word by word as the two formats define it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Format:
    """One way to store a quantized layer."""

    method: str
    bits: int
    group: int  # -1: all inputs
    checkpoint_format: str = "gptq"

    @property
    def settings(self) -> dict[str, Any]:
        common = {"quant_method": self.method, "bits": self.bits, "group_size": self.group}
        if self.method == "awq":
            return common | {"zero_point": True, "version": "gemm", "modules_to_not_convert": None}
        return common | {"desc_act": False, "sym": False, "checkpoint_format": self.checkpoint_format}


def pack_layer(format: Format, weight: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a layer with about `weight` [outputs, inputs], and exactly what they mean, in float32."""
    inputs, top = weight.shape[1], 2**format.bits - 1
    group = inputs if format.group == -1 else format.group
    groups = weight.T.reshape(inputs // group, group, -1)
    low, high = groups.min(axis=1), groups.max(axis=1)
    scales = ((high - low) / top).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 0, top).astype(int)
    q = np.clip(np.rint(groups / scales[:, None].astype(np.float32)) + zeros[:, None], 0, top).astype(int)
    meaning = (scales.astype(np.float32)[:, None] * (q - zeros[:, None])).reshape(inputs, -1).T
    q = q.reshape(inputs, -1)
    if format.method == "awq":
        return {"qweight": _awq_words(q), "qzeros": _awq_words(zeros), "scales": scales}, meaning
    stored_zeros = (zeros - 1) % (top + 1) if format.checkpoint_format == "gptq" else zeros
    return {
        "qweight": _words(q.T, format.bits).T,
        "qzeros": _words(stored_zeros, format.bits),
        "scales": scales,
        "g_idx": (np.arange(inputs) // group).astype(np.int32),
    }, meaning


def _words(values: np.ndarray, bits: int) -> np.ndarray:
    """Along the last axis: the first value in the lowest bits."""
    per_word = 32 // bits
    words = np.zeros((values.shape[0], values.shape[1] // per_word), np.uint32)
    for i in range(words.shape[1]):
        for j in range(per_word):
            words[:, i] |= values[:, i * per_word + j].astype(np.uint32) << np.uint32(bits * j)
    return np.ascontiguousarray(words).view(np.int32)


def _awq_words(values: np.ndarray) -> np.ndarray:
    """Eight columns a word; its four-bit fields, from the lowest, are columns 0, 2, 4, 6, 1, 3, 5, 7."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    columns = [8 * word + column for word in range(values.shape[1] // 8) for column in order]
    return _words(values[:, columns], 4)


def save_quantized(source: Path, format: Format, quantized: Path, dequantized: Path) -> None:
    """The model `source` with the linear layers of its blocks in `format`, and the same in float32."""
    config = json.loads((source / "config.json").read_text())
    packed: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        floats[name] = tensor.float()
        if not name.endswith("_proj.weight"):
            packed[name] = tensor
            continue
        parts, meaning = pack_layer(format, tensor.float().numpy())
        floats[name] = torch.from_numpy(np.ascontiguousarray(meaning))
        module = name.removesuffix("weight")
        packed |= {module + part: torch.from_numpy(np.ascontiguousarray(array)) for part, array in parts.items()}
    _save(source, quantized, config | {"quantization_config": format.settings}, packed)
    _save(source, dequantized, config | {"dtype": "float32"}, floats)


def _save(source: Path, target: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def change(folder: Path, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Let `edit` change the quantization_config and the tensors of the checkpoint in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    edit(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
