"""Put a model's weights on the device: in bfloat16, or the matrices of linear layers in int8 or the file's 4 bits."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from octavo.backends.base import Progress
from octavo.errors import UnsupportedModel
from octavo.weights.tensor import Parameter, not_finite
from octavo.weights.tensor import Tensor as StoredTensor

from .device import or_out_of_memory
from .kernels.four_bits import FourBits
from .kernels.rotation import BLOCK, Int8Rows, quantize_rows
from .stored_integers import read_four_bits
from .weight_bytes import has_four_bits

_ROWS = 1 << 24  # values converted at a time

Matrix = Tensor | Int8Rows | FourBits
"""A weight on the device: bfloat16, or a matrix of a linear layer in integers."""

Weights = dict[str, Matrix]
"""The parameters of model/decoder.py by name. Where the embedding is the head too, the head's integers are apart."""


def load_weights(
    parameters: Mapping[str, Parameter],
    device: torch.device,
    progress: Progress,
    quantization: str,
    spans: Mapping[str, int],
) -> Weights:
    """Return the parameters on the device.

    Args:
        quantization: none: in bfloat16. 8bit: the matrices of linear layers are rounded to int8, with a scale for each
            span of a row (kernels/rotation.py). auto, 4bit: they stay in 4 bits where the file has 4
            (stored_integers.py).
        spans: of the rows of `out` and `down`, as many as these parameters have.

    Raises:
        DamagedWeights, OutOfMemory
        UnsupportedModel: 8bit, and the inputs of a layer are no multiple of 64; or 4bit, and the file has no 4 bits.
    """
    check_stored(parameters, quantization)
    advice = f"use a smaller model{'' if quantization in ('8bit', '4bit') else ' or quantization 8bit'}"
    with or_out_of_memory("the weights do not fit", advice):
        return _load_weights(parameters, device, progress, quantization, spans)


def check_stored(parameters: Mapping[str, Parameter], quantization: str) -> None:
    """Raise UnsupportedModel if the weights should be in 4 bits and the file has none."""
    if quantization == "4bit" and not any(map(has_four_bits, parameters.values())):
        raise UnsupportedModel(
            "quantization 4bit keeps the 4 bits of a file on a GPU (GGUF Q4_0, Q4_1 or Q4_K, AWQ, GPTQ), and this "
            "model has none: use quantization 8bit, or make such a file with octavo quantize --bits 4"
        )


def _load_weights(
    parameters: Mapping[str, Parameter],
    device: torch.device,
    progress: Progress,
    quantization: str,
    spans: Mapping[str, int],
) -> Weights:
    total = sum(parameter.nbytes for parameter in parameters.values())
    done, weights, tied = 0, Weights(), "head" not in parameters
    mixed = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    for name, parameter in parameters.items():
        four_bits = quantization in ("auto", "4bit") and has_four_bits(parameter)
        if four_bits and (name != "embed" or tied):
            weights[head_of(name) if name == "embed" else name] = read_four_bits(parameter, device, mixed)
        if name == "embed" or not four_bits:
            weights[name] = _bfloat16(parameter, device)
        if quantization == "8bit":
            round_weight(weights, name, tied, spans)
        for part in parameter.parts:
            part.release()
        done += parameter.nbytes
        progress(done, total)
    return weights


def _bfloat16(parameter: Parameter, device: torch.device) -> Tensor:
    """Return a parameter on the device. Raises DamagedWeights."""
    weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
    start = 0
    for part in parameter.parts:
        _copy(part, weight[start : start + part.shape[0]])
        start += part.shape[0]
    return weight


def head_of(weight: str) -> str:
    """Return the name of the form in integers that a weight has beside its own."""
    return weight + ".integers"


def recipe_of(weights: Weights) -> str:
    """Return the arithmetic of the linear layers: 8bit, bf16, or 4bit if some have 4 bits."""
    kinds = set(map(type, weights.values()))
    return "8bit" if Int8Rows in kinds else "4bit" if FourBits in kinds else "bf16"


def nbytes(weight: Matrix) -> int:
    """Return the bytes of a weight."""
    return weight.values.nbytes + weight.scales.nbytes if isinstance(weight, Int8Rows) else weight.nbytes


def round_weight(weights: Weights, name: str, tied: bool, spans: Mapping[str, int]) -> None:
    """Replace a linear layer's matrix by its int8 form; add that of a tied embedding.

    Args:
        spans: of the rows of `out` and `down`.

    Raises UnsupportedModel.
    """
    weight = weights[name]
    assert isinstance(weight, Tensor)
    if weight.dim() != 2 or (name == "embed" and not tied):
        return
    if weight.shape[1] % BLOCK:
        raise UnsupportedModel(
            f"quantization 8bit needs layers whose inputs are a multiple of {BLOCK}; {name} has {weight.shape[1]}"
        )
    count = spans.get(name.rpartition(".")[2], 1)
    weights[head_of(name) if name == "embed" else name] = quantize_rows(weight, count, of_weight=True)


def _copy(part: StoredTensor, weight: Tensor) -> None:
    """Copy a stored tensor into its part of a weight. Raises DamagedWeights if a value is not finite."""
    rows = max(1, _ROWS // (part.shape[-1] if len(part.shape) > 1 else 1))
    data = part.data if part.format == "BF16" and part.row_order is None and len(part.shape) > 1 else None
    for start in range(0, part.shape[0], rows):
        into = weight[start : start + rows]
        if data is None:
            values = torch.from_numpy(part.float32(start, start + len(into)))
        else:  # its bits, without a conversion
            values = torch.from_numpy(data[start : start + rows].view(np.int16).copy()).view(torch.bfloat16)
        into.copy_(values)
        if not bool(torch.isfinite(into).all()):
            raise not_finite(part.name)
