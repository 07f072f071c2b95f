"""Sums of hidden states, computed on the host from the residual stream."""

import numpy as np

from octavo.backends.base import PoolingBatch


def pooled_sums(residual: np.ndarray, weight: np.ndarray, eps: float, pooling: PoolingBatch) -> np.ndarray:
    """Return each sum of `pooling` with its rows' hidden states added, in float64, in order of position.

    Args:
        residual: float32 [N, hidden], the residual stream after the last layer.
        weight: float32 [hidden], of the final norm.
        eps: see Ops.norm.

    Returns:
        float64 [P, hidden].
    """
    sums = pooling.sums.copy()
    for p, (first, end) in enumerate(zip(pooling.first.tolist(), pooling.end.tolist(), strict=True)):
        for x in residual[first:end]:
            sums[p] += x / np.sqrt(np.mean(x * x) + np.float32(eps)) * weight
    return sums
