"""The torch backend: whole steps against transformers, and its sampling against transformers' processors and chance."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation import logits_process

from family_models import load_backend, reference_logits, relative_error
from octavo.backends.base import Backend, StepBatch, StepResult
from octavo.backends.torch.sampling import philox4x32, sample
from octavo.errors import ConfigError, OutOfMemory
from step_batches import run_chunks, sampling_batch, step_batch

VOCAB = 50


@pytest.fixture(scope="module")
def backend(tiny_llama: Path) -> Backend:
    return load_backend("torch", tiny_llama, "float32")


def greedy_step(backend: Backend, pieces: Sequence[tuple[Sequence[int], int, Sequence[int]]]) -> list[int]:
    """The likeliest token after the last row of each piece."""
    batch = step_batch(pieces, sample=[int(end) - 1 for end in np.cumsum([len(tokens) for tokens, _, _ in pieces])])
    tokens: list[int] = backend.step(batch).tokens.tolist()
    return tokens


def test_prefill_beside_decode_continues_as_transformers_does(backend: Backend, tiny_llama: Path) -> None:
    prompts = [list(range(10, 50)), list(range(100, 137))]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    expected = [
        model.generate(torch.tensor([prompt]), do_sample=False, min_new_tokens=20, max_new_tokens=20)[0].tolist()
        for prompt in prompts
    ]
    first, second = list(prompts[0]), list(prompts[1])
    first += greedy_step(backend, [(first, 0, [4, 1])])
    # The first sequence goes on while the second one's prompt comes in chunks of 16.
    for start in range(0, len(prompts[1]), 16):
        chunk = prompts[1][start : start + 16]
        tokens = greedy_step(backend, [(first[-1:], len(first) - 1, [4, 1]), (chunk, start, [0, 3])])
        first.append(tokens[0])
    second.append(tokens[1])
    while len(second) < len(expected[1]):
        step = [(ids[-1:], len(ids) - 1, pages) for ids, pages in ((second, [0, 3]), (first, [4, 1]))]
        for ids, token in zip((second, first), greedy_step(backend, step), strict=True):
            ids.append(token)
    assert second == expected[1]
    length = min(len(first), len(expected[0]))
    assert length > 55
    assert first[:length] == expected[0][:length]


def test_a_step_may_sample_nothing(backend: Backend) -> None:
    batch = step_batch([([1, 2, 3], 0, [0])], sample=[])
    assert backend.step(batch).tokens.shape == (0,)
    assert backend.logits(batch).shape == (0, backend.spec.vocab_size)


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_bfloat16_stays_close(model: str, tiny_model: Callable[[str], Path]) -> None:
    tokens = list(range(100))
    logits = run_chunks(load_backend("torch", tiny_model(model), "bfloat16"), tokens, 40, [0, 1, 2, 3])
    assert 1e-5 < relative_error(logits, reference_logits(tiny_model(model), tokens)) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_cuda(dtype: str, tolerance: float, tiny_llama: Path) -> None:
    tokens = list(range(100))
    logits = run_chunks(load_backend("torch", tiny_llama, dtype, "cuda"), tokens, 40, [0, 1, 2, 3])
    assert relative_error(logits, reference_logits(tiny_llama, tokens)) < tolerance


def test_kv_pages_that_cannot_fit(backend: Backend, tiny_llama: Path) -> None:
    assert backend.page_bytes == 3 * 2 * 32 * 2 * 32 * 4  # layers, k and v, tokens, heads, head_dim, bytes
    other = load_backend("torch", tiny_llama, "float32")
    with pytest.raises(OutOfMemory, match="pages fit") as error:
        other.allocate_kv(10**12)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="use device cpu"):
        load_backend("torch", tiny_llama, "float32", "cuda")


# Sampling


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def sample_rows(logits: np.ndarray, **fields: object) -> StepResult:
    """Sample each row; a scalar field holds for all of them."""
    rows = len(logits)
    given = sampling_batch(rows)
    arrays = {
        name: np.broadcast_to(np.asarray(value, getattr(given, name).dtype), getattr(given, name).shape)
        if np.ndim(value) == 0  # type: ignore[arg-type]
        else np.asarray(value, getattr(given, name).dtype)
        for name, value in fields.items()
    }
    return sample(logits, replace(given, **arrays))


def test_philox_gives_the_published_numbers() -> None:
    """The known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds)."""
    ones = 0xFFFFFFFF
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_greedy_takes_the_likeliest_and_the_lower_of_two() -> None:
    logits = random_logits(20)
    assert sample_rows(logits).tokens.tolist() == logits.argmax(axis=1).tolist()
    logits[:, [7, 30]] = 20.0
    assert sample_rows(logits).tokens.tolist() == [7] * 20


@pytest.mark.parametrize(
    ("fields", "warper"),
    [
        ({}, None),
        ({"temperature": 0.5}, logits_process.TemperatureLogitsWarper(0.5)),
        ({"top_k": 5}, logits_process.TopKLogitsWarper(5)),
        ({"top_p": 0.7}, logits_process.TopPLogitsWarper(0.7)),
        ({"min_p": 0.2}, logits_process.MinPLogitsWarper(0.2)),
        ({"repetition": 1.8}, logits_process.RepetitionPenaltyLogitsProcessor(1.8)),
    ],
)
def test_draws_follow_the_distribution_that_transformers_gives(
    fields: dict[str, float], warper: logits_process.LogitsProcessor | None
) -> None:
    draws = 4000
    logits = random_logits(1)
    history = np.argsort(-logits[0])[:5]  # the likeliest tokens; only the repetition penalty looks at it
    tokens = sample_rows(
        np.repeat(logits, draws, axis=0),
        **{"temperature": 1.0, "positions": np.arange(draws), "seeds": 11, **fields},
        history=np.tile(history, draws),
        history_start=np.arange(draws + 1) * len(history),
        history_outputs=2,
    ).tokens
    scores = torch.from_numpy(logits)
    if warper is not None:
        scores = warper(torch.from_numpy(history)[None], scores)
    expected = scores.softmax(dim=-1)[0].numpy()
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi_square = ((counts[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept])).sum()
    degrees = kept.sum() - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


def test_presence_and_frequency_count_outputs_only() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [3, 4, 5]] = [10.0, 9.5, 9.0]
    history = {"history": [3, 3, 4, 3], "history_start": [0, 4]}  # of the prompt: the first two
    assert sample_rows(logits, **history, history_outputs=0, presence=2.0).tokens.tolist() == [3]
    assert sample_rows(logits, **history, history_outputs=2, presence=0.6).tokens.tolist() == [3]
    assert sample_rows(logits, **history, history_outputs=2, presence=2.0).tokens.tolist() == [5]
    assert sample_rows(logits, **history, history_outputs=4, frequency=0.4).tokens.tolist() == [4]


def test_bias_and_bans() -> None:
    logits = np.zeros((2, VOCAB), np.float32)
    fields = {"bias_tokens": [9, 0, 1], "bias_values": [1.0, -np.inf, -np.inf], "bias_start": [0, 1, 3]}
    assert sample_rows(logits, **fields).tokens.tolist() == [9, 2]


def test_rows_with_nothing_to_draw() -> None:
    logits = random_logits(3)
    logits[0, 4] = np.nan
    logits[1, 4] = np.inf
    logits[2] = -np.inf
    assert sample_rows(logits, temperature=[0, 1, 1]).tokens.tolist() == [-1, -1, -1]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(3)
    fields = {"bias_tokens": [9], "bias_values": [50.0], "bias_start": [0, 1, 1, 1]}
    result = sample_rows(logits, num_logprobs=[2, 0, -1], **fields)
    expected = torch.from_numpy(logits).log_softmax(dim=-1).numpy()
    likeliest = np.argsort(-logits[0])
    assert result.logprobs is not None and result.ranks is not None
    assert result.top_tokens is not None and result.top_logprobs is not None
    assert result.tokens[0] == 9
    np.testing.assert_allclose(result.logprobs[:2], expected[[0, 1], result.tokens[:2]], rtol=1e-5)
    assert np.isnan(result.logprobs[2])
    assert result.ranks.tolist() == [likeliest.tolist().index(9) + 1, 1, 0]
    assert result.top_tokens[0].tolist() == likeliest[:2].tolist()
    np.testing.assert_allclose(result.top_logprobs[0], expected[0, likeliest[:2]], rtol=1e-5)
    assert sample_rows(logits).logprobs is None


def test_both_samplers_pick_the_same_tokens(backend: Backend, tiny_llama: Path) -> None:
    """The native backend's whole step against this sampler on the native backend's own logits."""
    native = load_backend("cpu", tiny_llama)
    rng = np.random.default_rng(5)
    same = total = 0
    for _ in range(8):
        rows = 96
        batch = step_batch([(rng.integers(0, 512, rows).tolist(), 0, [0, 1, 2])])
        history = rng.integers(0, 512, rows * 5).astype(np.int32)
        sampling = sampling_batch(
            rows,
            temperature=rng.choice([0, 0.5, 1, 2], rows).astype(np.float32),
            top_k=rng.choice([0, 1, 10, 1000], rows).astype(np.int32),
            top_p=rng.choice([1, 0.9, 0.3], rows).astype(np.float32),
            min_p=rng.choice([0, 0.1], rows).astype(np.float32),
            seeds=rng.integers(0, 2**64, rows, np.uint64),
            positions=rng.integers(0, 2**40, rows),
            repetition=rng.choice([1, 1.3], rows).astype(np.float32),
            presence=rng.choice([0, 0.5], rows).astype(np.float32),
            frequency=rng.choice([0, -0.5], rows).astype(np.float32),
            history=history,
            history_start=(np.arange(rows + 1) * 5).astype(np.int32),
            history_outputs=rng.integers(0, 6, rows).astype(np.int32),
        )
        step: StepBatch = replace(batch, sampling=sampling)
        same += int((native.step(step).tokens == sample(native.logits(step), sampling).tokens).sum())
        total += rows
    native.close()
    assert same >= total - 1  # one draw in some thousands may fall on an edge that rounding moves
