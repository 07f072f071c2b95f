"""Every family against transformers: the logits of each backend, over prompts that cross pages and chunks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from family_models import PAGES, PROMPT, load_backend, reference_logits, relative_error
from step_batches import run_chunks
from tiny_models import CONFIGS

TOLERANCE = {"torch": 1e-4, "cpu": 1e-2}  # relative to transformers in float32


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
