"""Sums of hidden states and logits of labels, by each backend, against transformers; to the bit for any chunks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from family_models import PAGES, PROMPT, load_backend, relative_error
from octavo.backends.base import Backend, PoolingBatch
from step_batches import step_batch
from tiny_models import CONFIGS

TOLERANCE = {"torch": 1e-5, "cpu": 1e-2}  # relative to transformers in float32


def reference_hidden(path: Path, tokens: list[int]) -> np.ndarray:
    """The hidden states after the final norm, by transformers: [tokens, hidden]."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        output = model(torch.tensor([tokens]), output_hidden_states=True)
    hidden: np.ndarray = output.hidden_states[-1][0].numpy()
    return hidden


def sum_of(backend: Backend, tokens: list[int], chunk: int) -> np.ndarray:
    """The sum of the hidden states of all tokens, computed `chunk` tokens a step, with none sampled."""
    sums, nothing = np.zeros((1, backend.spec.hidden_size)), np.zeros(0, np.int32)
    for i in range(0, len(tokens), chunk):
        piece = tokens[i : i + chunk]
        ends = np.array([0], np.int32), np.array([len(piece)], np.int32)
        batch = step_batch([(piece, i, PAGES)], sample=[])
        result = backend.step(replace(batch, pooling=PoolingBatch(*ends, sums, nothing, nothing)))
        assert result.sums is not None
        sums = result.sums
    return sums[0]


@pytest.mark.parametrize("backend_name", ["torch", "cpu"])
@pytest.mark.parametrize("model", CONFIGS)
def test_sums_agree_with_transformers(model: str, backend_name: str, tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model(model)
    reference = reference_hidden(path, PROMPT).astype(np.float64)
    backend = load_backend(backend_name, path, dtype="float32" if backend_name == "torch" else "auto")
    whole = sum_of(backend, PROMPT, len(PROMPT))
    assert relative_error(whole, reference.sum(axis=0)) < TOLERANCE[backend_name]
    for chunk in (33, 7, 1):
        chunked = sum_of(backend, PROMPT, chunk)
        if backend_name == "cpu":
            np.testing.assert_array_equal(chunked, whole, f"chunks of {chunk}")
        else:
            np.testing.assert_allclose(chunked, whole, rtol=1e-4, atol=1e-3)
    backend.close()


@pytest.mark.parametrize("backend_name", ["torch", "cpu"])
def test_ranges_and_labels_of_several_sequences(backend_name: str, tiny_llama: Path) -> None:
    """Ranges of two sequences, an empty one among them, with sums so far; labels of one of three sampled rows."""
    backend = load_backend(backend_name, tiny_llama, dtype="float32" if backend_name == "torch" else "auto")
    first, second = PROMPT[:20], PROMPT[20:50]
    batch = step_batch([(first, 0, [1]), (second, 0, [2])], sample=[3, 19, 49])
    begin, end = np.array([0, 5, 20, 48], np.int32), np.array([20, 5, 50, 49], np.int32)
    sums = np.arange(4.0)[:, None] * np.ones(backend.spec.hidden_size)
    labels = np.array([1, 1], np.int32), np.array([7, 400], np.int32)
    result = backend.step(replace(batch, pooling=PoolingBatch(begin, end, sums, *labels)))
    assert result.sums is not None and result.label_logits is not None
    hidden = [reference_hidden(tiny_llama, part).astype(np.float64) for part in (first, second)]
    expected = np.stack([hidden[0].sum(axis=0), 0 * hidden[0][0], hidden[1].sum(axis=0), hidden[1][28]]) + sums
    assert relative_error(result.sums, expected) < TOLERANCE[backend_name]
    np.testing.assert_array_equal(result.sums[1], sums[1])
    np.testing.assert_array_equal(result.label_logits, backend.logits(batch)[1, [7, 400]])
    plain = backend.step(batch)
    assert plain.sums is None and plain.label_logits is None
    np.testing.assert_array_equal(plain.tokens, result.tokens)
    backend.close()


@pytest.mark.parametrize("begin, end", [(-1, 2), (0, 21), (3, 2)])
def test_ranges_outside_of_the_batch_are_refused(begin: int, end: int, tiny_llama: Path) -> None:
    backend, nothing = load_backend("cpu", tiny_llama), np.zeros(0, np.int32)
    ends = np.array([begin], np.int32), np.array([end], np.int32)
    pooling = PoolingBatch(*ends, np.zeros((1, backend.spec.hidden_size)), nothing, nothing)
    with pytest.raises(ValueError, match="pooled row"):
        backend.step(replace(step_batch([(PROMPT[:20], 0, [0])]), pooling=pooling))
    backend.close()
