"""NaN and infinity in any tensor, under any recipe: refused at load with the tensor's name, or by the self-test."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")

from command_line import complaint
from octavo.backends.cpu import quantize
from octavo.config import EngineConfig
from octavo.engine.loading import load_engine
from octavo.errors import DamagedWeights
from octavo.formats.gguf import read_header
from octavo.weights import open_checkpoint
from octavo.weights.packed import write_packed
from packed_layers import Format, change, save_quantized
from tiny_gguf import K_QUANTS, QUANTISABLE, write_gguf

TinyModel = Callable[[str], Path]
NAN, INFINITY = float("nan"), float("inf")
EMBED, NORM, LAST_NORM = "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"
K_PROJ, DOWN = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"
LAST_DOWN = "model.layers.2.mlp.down_proj.weight"
BIAS = "model.layers.1.self_attn.q_proj.bias"


def with_value(source: Path, target: Path, name: str, value: float, dtype: torch.dtype | None = None) -> Path:
    """A copy of the model where one element of one tensor is `value`."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    tensor = tensors[name].to(dtype or tensors[name].dtype)
    tensor.view(-1)[tensor.numel() * 2 // 3] = value
    save_file({**tensors, name: tensor}, target / "model.safetensors", {"format": "pt"})
    return target


def load(path: Path, **settings: Any) -> None:
    load_engine(EngineConfig(model=str(path), **{"kv_cache_memory": "4MiB", "threads": 2, **settings}), path).close()


@pytest.mark.parametrize("quantization", ["none", "auto", "8bit", "4bit"])
@pytest.mark.parametrize("name", [EMBED, NORM, LAST_NORM, K_PROJ, DOWN, LAST_DOWN])
@pytest.mark.parametrize("value", [NAN, -INFINITY])
def test_a_value_that_is_no_number(
    value: float, name: str, quantization: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = with_value(tiny_llama, tmp_path / "model", name, value)
    with pytest.raises(DamagedWeights, match=name) as error:
        load(path, quantization=quantization)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype: torch.dtype, quantization: str, tiny_llama: Path, tmp_path: Path) -> None:
    path = with_value(tiny_llama, tmp_path / "model", DOWN, NAN, dtype)
    with pytest.raises(DamagedWeights, match=DOWN):
        load(path, quantization=quantization)


@pytest.mark.parametrize(("quantization", "value"), [("none", 3.4e38), ("8bit", 3e38), ("4bit", 1e5)])
def test_a_value_that_is_too_large(quantization: str, value: float, tiny_llama: Path, tmp_path: Path) -> None:
    path = with_value(tiny_llama, tmp_path / "model", DOWN, value, torch.float32)
    with pytest.raises(DamagedWeights, match=DOWN):
        load(path, quantization=quantization)


def test_biases_and_the_torch_backend(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = with_value(tiny_model("llama-biases"), tmp_path / "model", BIAS, NAN)
    for backend in ("cpu", "torch"):
        with pytest.raises(DamagedWeights, match=BIAS):
            load(path, backend=backend)


@pytest.mark.parametrize("format", [*QUANTISABLE, *K_QUANTS])
def test_scales_of_gguf(format: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Any scale or minimum of a block, or any value of a format of floats."""
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model("llama-256"), path, format)
    tensor = next(t for t in read_header(path).tensors if t.name == "blk.0.ffn_down.weight")
    data = bytearray(path.read_bytes())
    not_a_number = {"F32": NAN_BYTES[4], "BF16": NAN_BYTES[2]}.get(format, np.array([NAN], np.float16).tobytes())
    for at in {"Q3_K": [108], "Q6_K": [208], "Q2_K": [80, 82], "Q4_1": [0, 2], "Q5_1": [0, 2]}.get(format, [0]):
        damaged = bytearray(data)
        damaged[tensor.start + at : tensor.start + at + len(not_a_number)] = not_a_number
        path.write_bytes(damaged)
        for quantization in ("auto", "8bit", "4bit"):
            with pytest.raises(DamagedWeights, match=DOWN):
                load(path, quantization=quantization)


NAN_BYTES = {4: np.array([NAN], np.float32).tobytes(), 2: np.array([NAN], np.float32).tobytes()[2:]}


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_scales_of_awq_and_gptq(method: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    save_quantized(tiny_model("llama-256"), Format(method, 4, 64), tmp_path / "model", tmp_path / "floats")

    def edit(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.scales"][1, 5] = NAN

    change(tmp_path / "model", edit)
    with pytest.raises(DamagedWeights, match=DOWN):
        load(tmp_path / "model")


# octavo quantize


@pytest.mark.parametrize("bits", [8, 4])
def test_the_command_refuses_it_and_leaves_nothing(bits: int, tiny_llama: Path, tmp_path: Path) -> None:
    path = with_value(tiny_llama, tmp_path / "model", LAST_DOWN, NAN)
    assert LAST_DOWN in complaint("quantize", path, tmp_path / "packed", "--bits", str(bits))
    assert [folder.name for folder in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def no_progress() -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


@pytest.mark.parametrize(("name", "value"), [(EMBED, NAN), (DOWN, INFINITY), (NORM, NAN), (DOWN, 1e5)])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_tensor_is_checked_as_it_is_written(
    bits: int, name: str, value: float, tiny_llama: Path, tmp_path: Path, no_progress: Callable[[int, int], None]
) -> None:
    checkpoint = open_checkpoint(with_value(tiny_llama, tmp_path / "model", name, value, torch.float32))
    (tmp_path / "packed").mkdir()
    with pytest.raises(DamagedWeights, match=name):
        write_packed(
            tmp_path / "packed", checkpoint.config, checkpoint.tensors, dict.fromkeys(checkpoint.tensors, bits),
            quantize, {}, no_progress,
        )  # fmt: skip


def test_blocks_that_are_copied_are_checked_too(
    tiny_model: TinyModel, tmp_path: Path, no_progress: Callable[[int, int], None]
) -> None:
    write_gguf(tiny_model("llama-256"), tmp_path / "model.gguf", "Q4_0")
    start = next(t.start for t in read_header(tmp_path / "model.gguf").tensors if t.name == "blk.0.ffn_down.weight")
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.seek(start)
        file.write(np.array([INFINITY], np.float16).tobytes())
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    (tmp_path / "packed").mkdir()
    with pytest.raises(DamagedWeights, match=DOWN):
        write_packed(
            tmp_path / "packed", checkpoint.config, checkpoint.tensors, dict.fromkeys(checkpoint.tensors, 4),
            quantize, {}, no_progress,
        )  # fmt: skip


# The self-test


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_finite_weights_that_compute_infinity(backend: str, tiny_llama: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    for name in (LAST_DOWN, LAST_DOWN.replace("down", "gate"), LAST_DOWN.replace("down", "up")):
        tensors[name] = torch.full_like(tensors[name], 1e30)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedWeights, match="computes logits that are NaN or infinite"):
        load(path, backend=backend)


def test_the_smallest_engine_passes_it(tiny_llama: Path, tmp_path: Path) -> None:
    load(tiny_llama, max_batch_tokens=1, max_batch_size=1, max_model_len=2)
    path = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2}))
    load(path)


def test_the_command_line_says_which_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    path = with_value(tiny_llama, tmp_path / "model", DOWN, NAN)
    assert DOWN in complaint("generate", path, "hello", "--max-tokens", "1")
