"""Tiny models of every family on each backend, and transformers' logits for them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo.backends.base import Backend
from octavo.model import describe_model
from octavo.weights import open_checkpoint
from tiny_models import VOCAB_SIZE

PAGE_SIZE = 32
PROMPT = np.random.default_rng(0).integers(0, VOCAB_SIZE, 100).tolist()
PAGES = [5, 0, 7, 2]  # four pages for 100 tokens, out of order


def load_backend(
    name: str, path: Path, dtype: str = "auto", device: str = "cpu", quantization: str = "none"
) -> Backend:
    if name == "torch":
        from octavo.backends.torch import load
    else:
        load = getattr(pytest.importorskip("octavo.backends.cpu"), "load", None) or pytest.skip("not built")
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    backend: Backend = load(
        spec,
        parameters,
        page_size=PAGE_SIZE,
        max_batch_tokens=128,
        max_batch_size=128,  # every row is sampled
        max_model_len=256,
        threads=2,
        dtype=dtype,
        quantization=quantization,
        device=device,
        progress=lambda done, total: None,
    )
    backend.allocate_kv(8)
    return backend


def reference_logits(path: Path, tokens: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


def relative_error(logits: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))
