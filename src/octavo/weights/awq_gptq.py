"""AWQ and GPTQ checkpoints: the integers of each linear layer, put into blocks of 32 along k when a backend reads them.

Both methods store a layer transposed (a row is an input) as qweight, qzeros (4- or 8-bit integers in 32-bit words) and
scales, with w = scale * (q - zero), scale and zero shared by a group of inputs. Layouts: AutoAWQ's
awq/utils/packing_utils.py ("gemm") and AutoGPTQ's auto_gptq/nn_modules/qlinear.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from octavo.errors import DamagedWeights, UnsupportedModel

from .tensor import W4G32, W8G32, Tensor

_BLOCK = 32
_OUTPUTS = 1024  # converted at a time, so that little memory lies between the file and the result
_AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]  # which four bits of a word, counted from the lowest, belong to output i


@dataclass(frozen=True)
class _Packing:
    """What a quantization_config says of every layer."""

    method: str  # awq or gptq
    bits: int  # 4 or 8
    group_size: int  # inputs that share scale and zero; -1: all
    zero_offset: int = 0  # to be added to the stored zeros

    @property
    def per_word(self) -> int:
        return 32 // self.bits


@dataclass(frozen=True)
class _Layer:
    """The tensors of one linear layer, checked: n inputs, m outputs, g groups of inputs."""

    qweight: Tensor  # awq: [n, m / per_word], gptq: [n / per_word, m]
    qzeros: Tensor  # [g, m / per_word]
    scales: Tensor  # [g, m]
    inputs: int
    outputs: int


def open_quantized(settings: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with the parts of each layer replaced by its weight, of format W4G32 or W8G32.

    `settings` is the quantization_config. Raises UnsupportedModel or DamagedWeights.
    """
    packing = _packing(settings)
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            weight = _weight(packing, module, tensors)
            result[weight.name] = weight
        elif f"{module}.qweight" not in tensors or part not in ("qzeros", "scales", "g_idx"):
            result[name] = tensor
    return result


def _packing(settings: dict[str, Any]) -> _Packing:
    method, bits, group_size = settings["quant_method"], settings.get("bits"), settings.get("group_size")
    if method == "awq":
        bits, group_size = settings.get("w_bit", bits), settings.get("q_group_size", group_size)
        version, zero_point = str(settings.get("version", "gemm")).lower(), settings.get("zero_point", True)
        if bits != 4 or version != "gemm" or not zero_point:
            raise UnsupportedModel(
                f"the AWQ weights have {bits!r} bits, version {version!r}, zero_point {zero_point!r}; "
                "supported are 4 bits, version gemm, with zero points"
            )
        zero_offset = 0
    else:
        format = settings.get("checkpoint_format", "gptq")
        if bits not in (4, 8) or format not in ("gptq", "gptq_v2"):
            raise UnsupportedModel(
                f"the GPTQ weights have {bits!r} bits in format {format!r}; supported are 4 and 8 bits, gptq or gptq_v2"
            )
        zero_offset = 1 if format == "gptq" else 0
    if not isinstance(group_size, int) or (group_size != -1 and (group_size <= 0 or group_size % _BLOCK)):
        raise UnsupportedModel(f"the {method} weights have groups of {group_size!r}; supported are multiples of 32")
    return _Packing(method, bits, group_size, zero_offset)


def _weight(packing: _Packing, module: str, tensors: dict[str, Tensor]) -> Tensor:
    layer = _layer(packing, module, tensors)

    def release() -> None:
        for tensor in (layer.qweight, layer.qzeros, layer.scales):
            tensor.release()

    format = "W4G32" if packing.bits == 4 else "W8G32"
    shape = (layer.outputs, layer.inputs)
    return Tensor(f"{module}.weight", shape, format, partial(_convert, packing, layer), release=release)


def _layer(packing: _Packing, module: str, tensors: dict[str, Tensor]) -> _Layer:
    parts = {part: tensors.get(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")}
    qweight, qzeros, scales = parts.values()
    if qweight is None or qzeros is None or scales is None:
        missing = next(part for part, tensor in parts.items() if tensor is None)
        raise DamagedWeights(f"the checkpoint has no tensor '{module}.{missing}'; download it again")
    if any(len(tensor.shape) != 2 for tensor in (qweight, qzeros, scales)):
        raise DamagedWeights(f"the parts of {module!r} are no matrices; download the checkpoint again")
    outputs = scales.shape[1]
    inputs = qweight.shape[0] * (packing.per_word if packing.method == "gptq" else 1)
    group = inputs if packing.group_size == -1 else packing.group_size
    words = outputs // packing.per_word
    expected = {
        "qweight": ("I32", (inputs, words) if packing.method == "awq" else (inputs // packing.per_word, outputs)),
        "qzeros": ("I32", (inputs // group, words)),
        "scales": (scales.format if scales.format in ("F16", "BF16", "F32") else "F16", (inputs // group, outputs)),
    }
    for part, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales)):
        if (tensor.format, tensor.shape) != expected[part] or inputs % group or outputs % packing.per_word:
            raise DamagedWeights(
                f"tensor {tensor.name!r} is {tensor.format} of shape {list(tensor.shape)}, which does not fit "
                f"{packing.bits} bits in groups of {packing.group_size}; download the checkpoint again"
            )
    if inputs % _BLOCK:
        raise UnsupportedModel(f"{module!r} has {inputs} inputs; supported are quantized layers of a multiple of 32")
    if f"{module}.g_idx" in tensors:
        _check_order(tensors[f"{module}.g_idx"], inputs, group)
    return _Layer(qweight, qzeros, scales, inputs, outputs)


def _check_order(order: Tensor, inputs: int, group: int) -> None:
    """Refuse groups that are not of neighboring inputs: `order` has the group of each."""
    if order.format != "I32" or not np.array_equal(order.data.view(np.int32)[0], np.arange(inputs) // group):
        raise UnsupportedModel(
            f"tensor {order.name!r} puts inputs in activation order (desc_act), which is not supported; "
            "use a checkpoint that was made with desc_act false"
        )


def _convert(packing: _Packing, layer: _Layer) -> np.ndarray:
    """The weight's rows: uint8 [outputs, bytes of inputs / 32 blocks]."""
    blocks = np.empty((layer.outputs, layer.inputs // _BLOCK), W4G32 if packing.bits == 4 else W8G32)
    scales = layer.scales.float32()
    per_group = blocks.shape[1] // len(scales)
    read = _read_awq if packing.method == "awq" else _read_gptq
    for start in range(0, layer.outputs, _OUTPUTS):
        stop = min(start + _OUTPUTS, layer.outputs)
        q, zeros = read(packing, layer, start, stop)
        zeros = zeros + np.uint8(packing.zero_offset) & np.uint8(2**packing.bits - 1)
        q = q.T.reshape(stop - start, -1, _BLOCK)
        scale, zero = scales[:, start:stop].T, zeros.T.astype(np.float32)
        into = blocks[start:stop]
        if packing.bits == 4:
            into["q"] = q[..., :16] | q[..., 16:] << 4
        else:
            into["q"] = (q ^ 128).view(np.int8)  # q - 128
            zero = zero - 128
        into["scale"] = scale.repeat(per_group, axis=1)
        into["min"] = (-scale * zero).repeat(per_group, axis=1)
    return blocks.view(np.uint8)


def _read_awq(packing: _Packing, layer: _Layer, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """q and zeros of some outputs: uint8 [n, stop - start] and [g, stop - start]."""

    def read(tensor: Tensor) -> np.ndarray:
        nibbles = _integers(tensor.data[:, start // 2 : stop // 2], packing.bits)
        return nibbles.reshape(len(nibbles), -1, 8)[:, :, _AWQ_NIBBLES].reshape(len(nibbles), -1)

    return read(layer.qweight), read(layer.qzeros)


def _read_gptq(packing: _Packing, layer: _Layer, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """q and zeros of some outputs: uint8 [n, stop - start] and [g, stop - start]."""
    columns = _integers(layer.qweight.data[:, start * 4 : stop * 4], packing.bits)
    q = columns.reshape(len(columns), -1, packing.per_word).swapaxes(1, 2).reshape(layer.inputs, -1)
    zeros = layer.qzeros.data[:, start * packing.bits // 8 : stop * packing.bits // 8]
    return q, _integers(zeros, packing.bits)


def _integers(rows: np.ndarray, bits: int) -> np.ndarray:
    """The integers in rows of bytes, in order of significance: uint8 [rows, bytes * 8 / bits]."""
    return rows if bits == 8 else np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)
