"""Part b: how far the backend is from float32 PyTorch on the device, and how far bfloat16 PyTorch is."""

import argparse

import numpy as np
import torch

from octavo.backends.base import Backend
from octavo.backends.cuda.weights import Weights
from octavo.backends.torch.backend import TorchBackend
from octavo.model.spec import DecoderSpec

from .report import Report
from .shapes import LLAMA_8B, PAGE_SIZE, QWEN3_06B, backend, random_weights, shortened, step

TOKENS = np.random.default_rng(0).integers(1, 1000, 700).tolist()


def run(report: Report, options: argparse.Namespace) -> None:
    for name, spec in (
        ("Qwen3-0.6B, 4 layers", shortened(QWEN3_06B, 4)),
        ("Llama-3.1-8B, 2 layers", shortened(LLAMA_8B, 2)),
    ):
        with report.attempt(name):
            compare(report, name, spec)


def compare(report: Report, name: str, spec: DecoderSpec) -> None:
    weights = random_weights(spec)
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = logits(oracle(spec, weights, torch.float32))
    plain = distance(logits(oracle(spec, weights, torch.bfloat16)), expected)
    rounded = random_weights(spec, recipe="8bit")
    for kind, recipe, int8_kv, margin in (
        (name, weights, False, 2e-3),
        (f"{name}, int8 KV", weights, True, 1e-2),
        (f"{name}, 8bit", rounded, False, 4e-2),
    ):
        with report.attempt(kind):
            made = backend(spec, recipe, 32, batch_tokens=700, batch_size=256, int8_kv=int8_kv)
            error = distance(logits(made), expected)
            made.close()
            limit = 2 * plain + margin
            report.check(f"{kind}: relative error", error < limit, f"{error:.2e} (PyTorch in bfloat16: {plain:.2e})")


def oracle(spec: DecoderSpec, weights: Weights, dtype: torch.dtype) -> Backend:
    plain = {name: weight.to(dtype) for name, weight in weights.items() if isinstance(weight, torch.Tensor)}
    made = TorchBackend(spec, plain, dtype, PAGE_SIZE)
    made.allocate_kv(32)
    return made


def logits(made: Backend) -> np.ndarray:
    """Return logits of every third token of a prompt in two chunks, and of a decode step."""
    pages = list(range(22))
    first = made.logits(step([(TOKENS[:500], 0, pages)], list(range(0, 500, 3))))
    second = made.logits(step([(TOKENS[500:699], 500, pages)], list(range(0, 199, 3))))
    return np.concatenate([first, second, made.logits(step([(TOKENS[699:], 699, pages)]))])


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference relative to the norm of `expected`."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
