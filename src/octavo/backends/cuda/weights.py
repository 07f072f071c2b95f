"""Put a model's weights on the device, in bfloat16."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from octavo.backends.base import Progress
from octavo.errors import OutOfMemory
from octavo.weights.tensor import Parameter, not_finite
from octavo.weights.tensor import Tensor as StoredTensor

_ROWS = 1 << 24  # values converted at a time


def load_weights(parameters: Mapping[str, Parameter], device: torch.device, progress: Progress) -> dict[str, Tensor]:
    """Return the parameters by name, in bfloat16 on the device. Raises DamagedWeights, OutOfMemory."""
    total = sum(part.nbytes for parameter in parameters.values() for part in parameter.parts)
    done, weights = 0, {}
    for name, parameter in parameters.items():
        try:
            weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        except torch.OutOfMemoryError:
            raise OutOfMemory(f"the weights do not fit in the memory of {device}; use a smaller model") from None
        start = 0
        for part in parameter.parts:
            _copy(part, weight[start : start + part.shape[0]])
            start += part.shape[0]
            part.release()
            done += part.nbytes
            progress(done, total)
        weights[name] = weight
    return weights


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
