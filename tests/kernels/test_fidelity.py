"""SmolLM2 on real text: Octavo strays from the float32 model hardly more than transformers' own bfloat16 does."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from family_models import load_backend
from octavo.backends.base import Backend
from octavo.text import Tokenizer
from step_batches import run_chunks
from tiny_models import real_text

NUM_TOKENS = 480  # in contexts of CONTEXT tokens, as KV pools of the tests hold no more
CONTEXT = 240
PAGES = list(range(8))


@pytest.fixture(scope="module")
def texts(smollm2: Path) -> list[list[int]]:
    tokens = Tokenizer.load(smollm2).encode(real_text()[:20_000])[:NUM_TOKENS]
    assert len(tokens) == NUM_TOKENS
    return [tokens[i : i + CONTEXT] for i in range(0, NUM_TOKENS, CONTEXT)]


def of_transformers(model: PreTrainedModel, texts: list[list[int]]) -> list[np.ndarray]:
    with torch.inference_mode():
        return [model(torch.tensor([text])).logits[0].float().numpy() for text in texts]


def of_backend(backend: Backend, texts: list[list[int]]) -> list[np.ndarray]:
    return [run_chunks(backend, text, 100, PAGES) for text in texts]


def mean_kl(reference: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Mean over tokens of KL(reference ‖ other), in nats."""
    divergences = []
    for p_logits, q_logits in zip(reference, other, strict=True):
        p, q = (torch.from_numpy(logits).double().log_softmax(dim=-1) for logits in (p_logits, q_logits))
        divergences.append((p.exp() * (p - q)).sum(dim=-1))
    return float(torch.cat(divergences).mean())


def test_bfloat16_fidelity(smollm2: Path, smollm2_in_transformers: PreTrainedModel, texts: list[list[int]]) -> None:
    texts = texts[:2]  # transformers takes a minute where the processor has no bfloat16
    reference = of_transformers(smollm2_in_transformers, texts)
    ours = mean_kl(reference, of_backend(load_backend("cpu", smollm2), texts))
    theirs = mean_kl(reference, of_transformers(copy.deepcopy(smollm2_in_transformers).bfloat16(), texts))
    print(f"mean KL from float32 over {2 * CONTEXT} tokens: octavo {ours:.3g}, transformers bfloat16 {theirs:.3g}")
    assert 0 < ours <= 1.5 * theirs


def test_the_oracle_is_exact(smollm2: Path, smollm2_in_transformers: PreTrainedModel, texts: list[list[int]]) -> None:
    backend = load_backend("torch", smollm2, "float32")
    assert mean_kl(of_transformers(smollm2_in_transformers, texts[:1]), of_backend(backend, texts[:1])) < 1e-8


def test_greedy_text_is_that_of_transformers(
    smollm2: Path, smollm2_in_transformers: PreTrainedModel, texts: list[list[int]]
) -> None:
    prompt = texts[0][:40]
    generated = smollm2_in_transformers.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0].tolist()
    backend = load_backend("torch", smollm2, "float32")
    predicted = run_chunks(backend, generated[:-1], 64, PAGES).argmax(axis=1)
    assert predicted[len(prompt) - 1 :].tolist() == generated[len(prompt) :]
