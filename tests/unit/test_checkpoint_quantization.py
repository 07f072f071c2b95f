"""AWQ and GPTQ checkpoints: every layer is what its integers mean, and what cannot be read is refused in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from family_models import PAGES, PROMPT, load_backend, reference_logits, relative_error
from octavo.errors import DamagedWeights, OctavoError, UnsupportedModel
from octavo.weights import Tensor, open_checkpoint
from octavo.weights.awq_gptq import open_quantized
from packed_layers import Format, change, pack_layer, save_quantized
from step_batches import run_chunks

AWQ, GPTQ = Format("awq", 4, 128), Format("gptq", 4, 128)
FORMATS = [
    AWQ,
    Format("awq", 4, 32),
    Format("awq", 4, -1),
    GPTQ,
    Format("gptq", 4, 64, "gptq_v2"),
    Format("gptq", 8, 128),
    Format("gptq", 8, 32, "gptq_v2"),
]
Q_PROJ = "model.layers.1.self_attn.q_proj"


def tensors_of(parts: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The parts of a layer "layer" as a safetensors file would give them."""
    formats = {"int32": "I32", "float16": "F16"}
    return {
        f"layer.{part}": Tensor(
            f"layer.{part}",
            array.shape,
            formats[array.dtype.name],
            np.ascontiguousarray(array).reshape(array.shape[0] if array.ndim == 2 else 1, -1).view(np.uint8),
        )
        for part, array in parts.items()
    }


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_layer_is_what_its_integers_mean(format: Format) -> None:
    weight = np.random.default_rng(0).normal(size=(1064, 384)).astype(np.float32)  # more outputs than one piece
    weight[5] = np.abs(weight[5])  # a zero of 0, which GPTQ stores as -1
    parts, meaning = pack_layer(format, weight)
    tensors = open_quantized(format.settings, tensors_of(parts))
    assert list(tensors) == ["layer.weight"]
    layer = tensors["layer.weight"]
    assert (layer.shape, layer.format) == (weight.shape, f"W{format.bits}G32")
    assert layer.nbytes == layer.data.nbytes
    np.testing.assert_array_equal(layer.float32(), meaning)
    np.testing.assert_array_equal(layer.float32(7, 12), meaning[7:12])
    assert relative_error(meaning, weight) < (0.15 if format.bits == 4 else 0.01)  # the test's own packing is sane


def test_the_order_of_outputs_in_an_awq_word() -> None:
    """0x75316420 is the word that AutoAWQ's kernels unpack to 0, 1, 2 ... 7."""
    qweight = np.full((32, 1), 0x75316420, np.int32)
    parts = {"qweight": qweight, "qzeros": np.zeros((1, 1), np.int32), "scales": np.ones((1, 8), np.float16)}
    layer = open_quantized(Format("awq", 4, 32).settings, tensors_of(parts))["layer.weight"]
    assert layer.float32()[:, 3].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_logits_are_those_of_the_dequantized_model(
    format: Format, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    quantized, dequantized = tmp_path / "quantized", tmp_path / "dequantized"
    save_quantized(tiny_model("llama-256"), format, quantized, dequantized)
    backend = load_backend("torch", quantized, dtype="float32")
    logits = run_chunks(backend, PROMPT, 64, PAGES)
    assert relative_error(logits, reference_logits(dequantized, PROMPT)) < 1e-4
    assert relative_error(logits, reference_logits(tiny_model("llama-256"), PROMPT)) > 1e-3


@pytest.fixture
def quantized(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[Format], Path]:
    def make(format: Format) -> Path:
        save_quantized(tiny_model("llama-256"), format, tmp_path / "quantized", tmp_path / "dequantized")
        return tmp_path / "quantized"

    return make


def set_(**settings: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda config, tensors: config.update(settings)


def without(part: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def edit(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{Q_PROJ}.{part}"]

    return edit


def in_activation_order(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    order = tensors[f"{Q_PROJ}.g_idx"]
    tensors[f"{Q_PROJ}.g_idx"] = order.flip(0)


def half_the_scales(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q_PROJ}.scales"] = tensors[f"{Q_PROJ}.scales"][:1]


@pytest.mark.parametrize(
    ("format", "edit", "error", "message"),
    [
        (GPTQ, in_activation_order, UnsupportedModel, f"{Q_PROJ}.*activation order"),
        (GPTQ, set_(bits=3), UnsupportedModel, "3 bits in format 'gptq'; supported are 4 and 8"),
        (GPTQ, set_(checkpoint_format="marlin"), UnsupportedModel, "'marlin'"),
        (GPTQ, set_(group_size=48), UnsupportedModel, "groups of 48; supported are multiples of 32"),
        (GPTQ, set_(group_size=64), DamagedWeights, "does not fit 4 bits in groups of 64"),
        (GPTQ, set_(group_size=[]), UnsupportedModel, "groups of \\[\\]"),
        (GPTQ, set_(bits=8), DamagedWeights, "does not fit 8 bits"),
        (AWQ, set_(version="gemv"), UnsupportedModel, "version 'gemv'.* supported are 4 bits, version gemm"),
        (AWQ, set_(bits=8), UnsupportedModel, "8 bits"),
        (AWQ, set_(zero_point=False), UnsupportedModel, "zero_point False"),
        (AWQ, set_(quant_method="fp8"), UnsupportedModel, "quantized by 'fp8'; supported are AWQ and GPTQ"),
        (AWQ, set_(quant_method=None), UnsupportedModel, "quantized by None"),
        (AWQ, without("qzeros"), DamagedWeights, f"no tensor '{Q_PROJ}.qzeros'"),
        (AWQ, half_the_scales, DamagedWeights, f"{Q_PROJ}.scales.* does not fit"),
    ],
)
def test_what_cannot_be_read_is_refused(
    format: Format,
    edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None],
    error: type[OctavoError],
    message: str,
    quantized: Callable[[Format], Path],
) -> None:
    folder = quantized(format)
    open_checkpoint(folder)
    change(folder, edit)
    with pytest.raises(error, match=message) as raised:
        open_checkpoint(folder)
    assert "\n" not in str(raised.value)


def test_group_index_is_no_condition(quantized: Callable[[Format], Path]) -> None:
    """Checkpoints without activation order may leave it out."""
    folder = quantized(GPTQ)
    change(folder, without("g_idx"))
    assert open_checkpoint(folder).tensors[f"{Q_PROJ}.weight"].format == "W4G32"
