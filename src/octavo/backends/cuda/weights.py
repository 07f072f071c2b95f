"""Put a model's weights on the device, in bfloat16, or the matrices of linear layers in int8."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from octavo.backends.base import Progress
from octavo.errors import UnsupportedModel
from octavo.weights.tensor import Parameter, not_finite
from octavo.weights.tensor import Tensor as StoredTensor

from .device import or_out_of_memory
from .kernels.rotation import BLOCK, Int8Rows, quantize_rows

_ROWS = 1 << 24  # values converted at a time

Weights = dict[str, Tensor | Int8Rows]
"""The parameters of model/decoder.py by name. Where the embedding is the head too, the head's int8 form is apart."""


def load_weights(
    parameters: Mapping[str, Parameter], device: torch.device, progress: Progress, int8: bool = False
) -> Weights:
    """Return the parameters on the device.

    Args:
        int8: round the matrices of linear layers to int8, with a scale for each row (kernels/rotation.py).

    Raises:
        DamagedWeights, OutOfMemory
        UnsupportedModel: int8, and the inputs of a layer are no multiple of 64.
    """
    with or_out_of_memory("the weights do not fit", f"use a smaller model{'' if int8 else ' or quantization 8bit'}"):
        return _load_weights(parameters, device, progress, int8)


def _load_weights(parameters: Mapping[str, Parameter], device: torch.device, progress: Progress, int8: bool) -> Weights:
    total = sum(part.nbytes for parameter in parameters.values() for part in parameter.parts)
    done, weights = 0, Weights()
    for name, parameter in parameters.items():
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        start = 0
        for part in parameter.parts:
            _copy(part, weight[start : start + part.shape[0]])
            start += part.shape[0]
            part.release()
            done += part.nbytes
            progress(done, total)
        weights[name] = weight
        if int8:
            round_weight(weights, name, tied="head" not in parameters)
    return weights


def head_of(weight: str) -> str:
    """Return the name of the int8 form that a weight has beside its own."""
    return weight + ".int8"


def nbytes(weight: Tensor | Int8Rows) -> int:
    """Return the bytes of a weight."""
    return weight.values.nbytes + weight.scales.nbytes if isinstance(weight, Int8Rows) else weight.nbytes


def round_weight(weights: Weights, name: str, tied: bool) -> None:
    """Replace a linear layer's matrix by its int8 form; add that of a tied embedding. Raises UnsupportedModel."""
    weight = weights[name]
    assert isinstance(weight, Tensor)
    if weight.dim() != 2 or (name == "embed" and not tied):
        return
    if weight.shape[1] % BLOCK:
        raise UnsupportedModel(
            f"quantization 8bit needs layers whose inputs are a multiple of {BLOCK}; {name} has {weight.shape[1]}"
        )
    weights[head_of(name) if name == "embed" else name] = quantize_rows(weight, of_weight=True)


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
