"""Rounding to 4 bits: the weighted search against numpy, and the importances against transformers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

native = pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")

from octavo.backends.cpu import load, measure_importances  # noqa: E402
from octavo.backends.cpu.calibration import random_tokens  # noqa: E402
from octavo.model import describe_model  # noqa: E402
from octavo.weights import open_checkpoint  # noqa: E402
from octavo.weights.packed import write_packed  # noqa: E402
from step_batches import run_chunks  # noqa: E402
from test_families import PAGES, PROMPT  # noqa: E402
from tiny_gguf import write_gguf  # noqa: E402

TinyModel = Callable[[str], Path]
GROUP = 32
DRAWS = ["standard_normal", "standard_cauchy", "random"]

# The search


def decoded(stored: np.ndarray) -> np.ndarray:
    return np.asarray(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q4_1), np.float32)


def errors(stored: np.ndarray, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Of each group, weighted: float64 [groups]."""
    squares = np.square(decoded(stored).astype(np.float64) - values)
    return (squares * (1 if importance is None else importance)).reshape(-1, GROUP).sum(axis=1)


def sample(draw: str, seed: int, rows: int = 64, columns: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, columns], and importances as uneven as real ones: float32 [columns]."""
    rng = np.random.default_rng(seed)
    return getattr(rng, draw)((rows, columns)).astype(np.float32), rng.lognormal(0, 2, columns).astype(np.float32)


def least_error(values: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """By a slow search, with scale and minimum in float64, from 400 ranges in ten turns each: float64 [groups]."""
    x = values.reshape(-1, GROUP).astype(np.float64)
    w = np.tile(importance.astype(np.float64).reshape(-1, GROUP), (len(values), 1))
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    total, x_mean = w.sum(axis=1, keepdims=True), (w * x).sum(axis=1, keepdims=True) / w.sum(axis=1, keepdims=True)
    least = np.full(len(x), np.inf)
    for at_low in np.linspace(-0.1, 0.4, 20):
        for at_high in np.linspace(0.6, 1.1, 20):
            minimum, scale = low + (high - low) * at_low, (high - low) * (at_high - at_low) / 15
            for _ in range(10):
                q = np.rint((x - minimum) / scale).clip(0, 15)
                least = np.minimum(least, (w * np.square(scale * q + minimum - x)).sum(axis=1))
                q_mean = (w * q).sum(axis=1, keepdims=True) / total
                variance = (w * np.square(q - q_mean)).sum(axis=1, keepdims=True)
                scale = (w * (q - q_mean) * x).sum(axis=1, keepdims=True) / np.maximum(variance, 1e-30)
                scale = np.where(scale == 0, 1, scale)
                minimum = x_mean - scale * q_mean
    return least


@pytest.mark.parametrize(("draw", "excess"), [("standard_normal", 1.2), ("standard_cauchy", 1.2), ("random", 1.2)])
def test_the_search_comes_near_the_best(draw: str, excess: float) -> None:
    values, importance = sample(draw, 1, rows=32)
    ours = errors(native.quantise(values, "Q4_1", importance), values, importance)
    best = least_error(values, importance)
    print((ours / best).mean(), ours.sum() / best.sum())
    assert (ours / best).mean() < excess


@given(st.sampled_from(DRAWS), st.integers(0, 2**32 - 1))
def test_weighting_lessens_the_weighted_error(draw: str, seed: int) -> None:
    values, importance = sample(draw, seed)
    weighted = errors(native.quantise(values, "Q4_1", importance), values, importance)
    alike = errors(native.quantise(values, "Q4_1"), values, importance)
    plain = errors(gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1), values, importance)
    assert weighted.sum() < 0.9 * alike.sum()
    # A group by itself: the columns' least weight, a hundredth of the mean, is not in this measure of the error.
    assert (weighted <= 1.02 * plain + 0.02 * importance.mean() * np.square(values).sum()).all()
