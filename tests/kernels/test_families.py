"""Every family against transformers: the logits of each backend, over prompts that cross pages and chunks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo.backends.base import Backend
from octavo.model import describe_model
from octavo.weights import open_checkpoint
from step_batches import run_chunks
from tiny_models import CONFIGS, VOCAB_SIZE

PAGE_SIZE = 32
PROMPT = np.random.default_rng(0).integers(0, VOCAB_SIZE, 100).tolist()
PAGES = [5, 0, 7, 2]  # four pages for 100 tokens, out of order
TOLERANCE = {"torch": 1e-4, "cpu": 1e-2}  # relative to transformers in float32


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


@pytest.mark.parametrize("backend_name", ["torch", "cpu"])
@pytest.mark.parametrize("model", CONFIGS)
def test_logits_agree_with_transformers(model: str, backend_name: str, tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model(model)
    reference = reference_logits(path, PROMPT)
    backend = load_backend(backend_name, path, dtype="float32" if backend_name == "torch" else "auto")
    for chunk in (len(PROMPT), 33, 7):
        logits = run_chunks(backend, PROMPT, chunk, PAGES)
        assert relative_error(logits, reference) < TOLERANCE[backend_name], f"chunks of {chunk}"
    backend.close()
