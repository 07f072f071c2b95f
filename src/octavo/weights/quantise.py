"""Quantising to the formats that Octavo writes: Q8_0, and Q4_1 with a search for each block's scale and minimum."""

import itertools

import numpy as np

_BLOCK = 32
_SHRINKS = (1.0, 0.9, 0.8)  # for either end of a block's range: to clip outliers may round the rest better
_REFITS = 2
_Q4_1 = np.dtype([("scale", "<f2"), ("min", "<f2"), ("q", "u1", _BLOCK // 2)])  # GGML's block_q4_1


def quantise(rows: np.ndarray, format: str) -> np.ndarray:
    """float32 [n, k] as rows of blocks, uint8 [n, bytes]. `format` is Q8_0 or Q4_1; k a multiple of 32."""
    if format == "Q4_1":
        return _q4_1(rows)
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    encoded: np.ndarray = quantize(rows, GGMLQuantizationType[format])
    return encoded


def _q4_1(rows: np.ndarray) -> np.ndarray:
    """Of several ranges per block, each refitted to what it rounds to, the one with the least squared error."""
    x = np.ascontiguousarray(rows).reshape(-1, _BLOCK)
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    middle = (low + high) / 2
    best = np.zeros(len(x), _Q4_1)
    least = np.full(len(x), np.inf, np.float32)
    for shrink_low, shrink_high in itertools.product(_SHRINKS, repeat=2):
        minimum = middle + (low - middle) * shrink_low
        scale = (middle + (high - middle) * shrink_high - minimum) / 15
        for _ in range(_REFITS):
            scale, minimum = _refitted(x, _rounded(x, scale, minimum))
        stored = np.concatenate([scale, minimum], axis=1).astype(np.float16)
        scale, minimum = stored[:, :1].astype(np.float32), stored[:, 1:].astype(np.float32)
        q = _rounded(x, scale, minimum)
        error = np.square(q * scale + minimum - x).sum(axis=1)
        better = error < least
        least[better] = error[better]
        nibbles = q[better].astype(np.uint8)
        best["scale"][better], best["min"][better] = stored[better].T
        best["q"][better] = nibbles[:, :16] | nibbles[:, 16:] << 4
    return best.view(np.uint8).reshape(len(rows), -1)


def _rounded(x: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """The nearest of 0..15, as float32."""
    q: np.ndarray = np.rint((x - minimum) / np.where(scale == 0, 1, scale)).clip(0, 15)
    return q


def _refitted(x: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum with the least squared error for given integers; the block's mean where they are all one."""
    q_mean, x_mean = q.mean(axis=1, keepdims=True), x.mean(axis=1, keepdims=True)
    spread = q - q_mean
    variance = np.square(spread).sum(axis=1, keepdims=True)
    scale = (spread * x).sum(axis=1, keepdims=True) / np.where(variance == 0, 1, variance)
    return scale, x_mean - scale * q_mean
