"""An engine's fingerprint: the same for the same pages, another for any that may differ."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.config import EngineConfig
from octavo.engine.loading import load_engine
from octavo.weights import fingerprint, open_checkpoint
from packed_layers import Format, change, save_quantized
from tiny_models import SHARDED


def engine_fingerprint(model: Path, **settings: Any) -> str:
    engine = load_engine(EngineConfig(model=str(model), **{"kv_cache_memory": "4MiB", **settings}), model)
    assert engine.info.fingerprint == engine.fingerprint
    engine.close()
    return engine.fingerprint


def checkpoint_fingerprint(path: Path) -> str:
    return fingerprint(open_checkpoint(path))


def test_engines_with_other_pages_have_other_fingerprints(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And settings that change no bit of a page change nothing."""
    first = engine_fingerprint(tiny_llama)
    assert len(first) == 32
    assert engine_fingerprint(tiny_llama, threads=1, kv_cache_memory="2MiB", max_batch_size=3) == first
    others = [
        {"quantization": "8bit"},
        {"quantization": "4bit"},
        {"kv_cache_dtype": "int8"},
        {"kv_cache_page_size": 64},
        {"backend": "torch"},
        {"backend": "torch", "dtype": "float32"},
    ]
    fingerprints = [first, *(engine_fingerprint(tiny_llama, **settings) for settings in others)]
    monkeypatch.setenv("OCTAVO_ISA", "portable")
    fingerprints.append(engine_fingerprint(tiny_llama))
    assert len(set(fingerprints)) == len(others) + 2


def test_a_copy_has_the_same_and_any_changed_tensor_another(tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    original = checkpoint_fingerprint(tiny_llama)
    assert checkpoint_fingerprint(copy) == original
    tensors = load_file(tiny_llama / "model.safetensors")
    seen = {original}
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor * 1.01}, copy / "model.safetensors")
        seen.add(checkpoint_fingerprint(copy))
    assert len(seen) == 1 + len(tensors)
    first, second = [name for name in tensors if name.endswith("layernorm.weight")][:2]
    save_file({**tensors, first: tensors[second], second: tensors[first]}, copy / "model.safetensors")
    assert checkpoint_fingerprint(copy) not in seen, "two tensors have changed places"


def test_what_is_only_in_the_configuration_counts(tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.125}))
    assert checkpoint_fingerprint(copy) != checkpoint_fingerprint(tiny_llama)


def test_checkpoints_of_every_kind(tiny_model: Callable[[str], Path], smollm2: Path, tmp_path: Path) -> None:
    """Several files, GGUF, and tensors that are converted as they are read: of those, the stored parts count."""
    quantized = tmp_path / "quantized"
    save_quantized(tiny_model("llama-256"), Format("gptq", 4, 64), quantized, tmp_path / "dequantized")
    paths = [tiny_model(SHARDED), smollm2, quantized]
    before = [checkpoint_fingerprint(path) for path in paths]
    assert before == [checkpoint_fingerprint(path) for path in paths]

    def raise_a_zero(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.qzeros"] += 1

    change(quantized, raise_a_zero)
    assert len({*before, checkpoint_fingerprint(quantized)}) == 4
