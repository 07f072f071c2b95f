"""AWQ and GPTQ checkpoints, converted to blocks of 32 values along k when a backend reads them.

Both methods store a linear layer transposed (a row per input) as qweight and qzeros (integers of 4 or 8 bits, packed in
32-bit words) and scales: w = scale * (q - zero), where a group of inputs shares scale and zero. Layouts: AutoAWQ's
awq/utils/packing_utils.py ("gemm") and AutoGPTQ's auto_gptq/nn_modules/qlinear.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from octavo.errors import DamagedWeights, UnsupportedModel, shortened

from .tensor import W4G32, W8G32, Tensor

_BLOCK = 32
_OUTPUTS = 1024  # converted at a time, to need little memory for intermediate results
_AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]  # output i of a word is in nibble _AWQ_NIBBLES[i], counted from the lowest


@dataclass(frozen=True)
class _Packing:
    """How all layers are quantized, according to the quantization_config."""

    method: str  # awq or gptq
    bits: int  # 4 or 8
    group_size: int  # inputs that share scale and zero; -1: all
    ordered: bool  # whether inputs are grouped in order of activation (desc_act), for which a layer has a g_idx
    zero_offset: int = 0  # added to the stored zeros

    @property
    def per_word(self) -> int:
        """Integers in a 32-bit word."""
        return 32 // self.bits


@dataclass(frozen=True)
class _Layer:
    """The tensors of a linear layer, whose shapes have been checked: n inputs, m outputs, g groups of inputs."""

    qweight: Tensor  # awq: [n, m / per_word], gptq: [n / per_word, m]
    qzeros: Tensor  # [g, m / per_word]
    scales: Tensor  # [g, m]
    inputs: int
    outputs: int


def open_quantized(settings: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the tensors of each quantized layer by its weight, in format W4G32 or W8G32.

    Args:
        settings: The quantization_config of config.json.
        tensors: The tensors of the checkpoint, by name.

    Raises:
        UnsupportedModel: The layers are quantized in a way that Octavo does not read.
        DamagedWeights: The tensors of a layer do not fit together.
    """
    packing = _packing(settings)
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            weight = _weight(packing, module, tensors)
            if weight.name in tensors:
                raise DamagedWeights(f"the checkpoint has both {weight.name!r} and {name!r}; download it again")
            result[weight.name] = weight
        elif f"{module}.qweight" not in tensors or part not in ("qzeros", "scales", "g_idx"):
            result[name] = tensor
    return result


def _packing(settings: dict[str, Any]) -> _Packing:
    """Read the quantization_config. Raises UnsupportedModel."""
    method, bits, group_size = settings["quant_method"], settings.get("bits"), settings.get("group_size")
    if method == "awq":
        bits, group_size = settings.get("w_bit", bits), settings.get("q_group_size", group_size)
        version, zero_point = str(settings.get("version", "gemm")).lower(), settings.get("zero_point", True)
        if type(bits) is not int or bits != 4 or version != "gemm" or zero_point is not True:
            found = shortened(f"{bits!r} bits, version {version!r}, zero_point {zero_point!r}")
            raise UnsupportedModel(f"the AWQ weights have {found}; supported are 4 bits, version gemm, zero_point True")
        zero_offset = 0
    else:
        format = settings.get("checkpoint_format", "gptq")
        if type(bits) is not int or bits not in (4, 8) or format not in ("gptq", "gptq_v2"):
            found = shortened(f"{bits!r} bits in format {format!r}")
            raise UnsupportedModel(
                f"the GPTQ weights have {found}; supported are 4 and 8 bits in format gptq or gptq_v2"
            )
        zero_offset = 1 if format == "gptq" else 0
    if type(group_size) is not int or (group_size != -1 and (group_size <= 0 or group_size % _BLOCK)):
        found = shortened(repr(group_size))
        raise UnsupportedModel(f"the {method} weights have groups of {found}; supported are multiples of 32, and -1")
    return _Packing(method, bits, group_size, bool(settings.get("desc_act")), zero_offset)


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
        raise DamagedWeights(f"the tensors of {module!r} are not matrices; download the checkpoint again")
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
    elif packing.method == "gptq" and packing.ordered and group < inputs:
        raise DamagedWeights(f"the checkpoint has no tensor '{module}.g_idx', which desc_act needs; download it again")
    return _Layer(qweight, qzeros, scales, inputs, outputs)


def _check_order(order: Tensor, inputs: int, group: int) -> None:
    """Raise UnsupportedModel if the inputs of a group are not contiguous. `order` holds the group of each input."""
    if order.format != "I32" or not np.array_equal(order.data.view(np.int32)[0], np.arange(inputs) // group):
        raise UnsupportedModel(
            f"tensor {order.name!r} puts inputs in activation order (desc_act), which is not supported; "
            "use a checkpoint that was made with desc_act false"
        )


def _convert(packing: _Packing, layer: _Layer) -> np.ndarray:
    """Compute the blocks of a layer's weight: uint8 [outputs, bytes of inputs / 32 blocks]."""
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
    """Return q and zeros of outputs start:stop: uint8 [n, stop - start] and [g, stop - start]."""

    def read(tensor: Tensor) -> np.ndarray:
        nibbles = _integers(tensor.data[:, start // 2 : stop // 2], packing.bits)
        return nibbles.reshape(len(nibbles), -1, 8)[:, :, _AWQ_NIBBLES].reshape(len(nibbles), -1)

    return read(layer.qweight), read(layer.qzeros)


def _read_gptq(packing: _Packing, layer: _Layer, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return q and zeros of outputs start:stop: uint8 [n, stop - start] and [g, stop - start]."""
    columns = _integers(layer.qweight.data[:, start * 4 : stop * 4], packing.bits)
    q = columns.reshape(len(columns), -1, packing.per_word).swapaxes(1, 2).reshape(layer.inputs, -1)
    zeros = layer.qzeros.data[:, start * packing.bits // 8 : stop * packing.bits // 8]
    return q, _integers(zeros, packing.bits)


def _integers(rows: np.ndarray, bits: int) -> np.ndarray:
    """Unpack integers of 4 or 8 bits, the lowest bits of a byte first: uint8 [rows, bytes * 8 / bits]."""
    return rows if bits == 8 else np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)
