"""Rounding to 4 bits: the weighted search against numpy, and the importances against transformers."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

native = pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")

from command_line import answer  # noqa: E402
from family_models import PAGES, PROMPT  # noqa: E402
from octavo.backends.cpu import load, measure_importances  # noqa: E402
from octavo.backends.cpu.calibration import random_tokens  # noqa: E402
from octavo.model import describe_model  # noqa: E402
from octavo.model.spec import DecoderSpec  # noqa: E402
from octavo.weights import Parameter, open_checkpoint  # noqa: E402
from step_batches import run_chunks  # noqa: E402
from tiny_gguf import write_gguf  # noqa: E402

TinyModel = Callable[[str], Path]
GROUP = 32
DRAWS = ["standard_normal", "standard_cauchy", "random"]
Q4_1 = gguf.GGMLQuantizationType.Q4_1


# The search


def errors(stored: np.ndarray, values: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Weighted, of each group: float64 [groups]."""
    squares = np.square(gguf.quants.dequantize(stored, Q4_1).astype(np.float64) - values)
    return (squares * importance).reshape(-1, GROUP).sum(axis=1)


def draw_rows(draw: str, seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, 96], and importances about as uneven as real ones: float32 [96]."""
    rng = np.random.default_rng(seed)
    return getattr(rng, draw)((rows, 96)).astype(np.float32), rng.lognormal(0, 2, 96).astype(np.float32)


def least_errors(values: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """By a slow search that does not round scale and minimum, from 144 ranges in 8 turns each: float64 [groups]."""
    x = values.reshape(-1, GROUP).astype(np.float64)
    w = np.tile(importance.reshape(-1, GROUP), (len(values), 1)).astype(np.float64)
    w /= w.sum(axis=1, keepdims=True)
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    x_mean = (w * x).sum(axis=1, keepdims=True)
    least = np.full(len(x), np.inf)
    for at_low in np.linspace(-0.1, 0.4, 12):
        for at_high in np.linspace(0.6, 1.1, 12):
            minimum, scale = low + (high - low) * at_low, (high - low) * (at_high - at_low) / 15
            for _ in range(8):
                q = np.rint((x - minimum) / scale).clip(0, 15)
                least = np.minimum(least, (w * np.square(scale * q + minimum - x)).sum(axis=1))
                q_mean = (w * q).sum(axis=1, keepdims=True)
                variance = (w * np.square(q - q_mean)).sum(axis=1, keepdims=True)
                covariance = (w * (q - q_mean) * x).sum(axis=1, keepdims=True)
                scale = np.where(variance * covariance == 0, scale, covariance / np.maximum(variance, 1e-30))
                minimum = x_mean - scale * q_mean
    return least * np.tile(importance.reshape(-1, GROUP).sum(axis=1), len(values))


@pytest.mark.parametrize("draw", DRAWS)
def test_the_search_comes_near_the_least_error(draw: str) -> None:
    values, importance = draw_rows(draw, seed=1, rows=24)
    excess = errors(native.quantize(values, "Q4_1", importance), values, importance) / least_errors(values, importance)
    assert 0.99 < np.median(excess) < 1.12
    assert excess.mean() < 1.35


@given(st.sampled_from(DRAWS), st.integers(0, 2**32 - 1))
@example("standard_cauchy", 10459127)  # one group has most of the sum of the errors, and a local search may miss there
def test_weighting_lessens_the_weighted_error(draw: str, seed: int) -> None:
    values, importance = draw_rows(draw, seed, rows=64)
    weighted = errors(native.quantize(values, "Q4_1", importance), values, importance)
    alike = errors(native.quantize(values, "Q4_1"), values, importance)
    assert np.median(weighted / alike) < 1


@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 0.0, 1.0, 3.0]))
def test_what_4_bits_can_hold_stays(seed: int, spread: float | None) -> None:
    rng = np.random.default_rng(seed)
    steps = rng.integers(0, 16, (40, 3, GROUP))
    steps[..., 0], steps[..., 1] = 15, 0
    scale, minimum = (rng.uniform(low, 2, (40, 3, 1)).astype(np.float16).astype(np.float32) for low in (0.1, -2))
    values = (scale * rng.permuted(steps, axis=2) + minimum).reshape(40, 96).astype(np.float32)
    importance = None if spread is None else rng.lognormal(0, spread, 96).astype(np.float32)
    np.testing.assert_array_equal(gguf.quants.dequantize(native.quantize(values, "Q4_1", importance), Q4_1), values)


@pytest.mark.parametrize("constant", [0.0, 0.75, -3.0, 6e4])
def test_constants_stay(constant: float) -> None:
    values = np.full((3, 64), constant, np.float32)
    decoded = gguf.quants.dequantize(native.quantize(values, "Q4_1"), Q4_1)
    np.testing.assert_array_equal(decoded, np.float32(np.float16(values)))


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-1.0], [0.0] * GROUP])
def test_a_group_with_unsound_importances_is_searched_without(bad: list[float]) -> None:
    values, importance = draw_rows("standard_normal", seed=2, rows=20)
    importance[32 : 32 + len(bad)] = bad
    groups, alike = (native.quantize(values, "Q4_1", w).reshape(20, 3, -1) for w in (importance, None))
    np.testing.assert_array_equal(groups[:, 1], alike[:, 1])
    assert (groups[:, [0, 2]] != alike[:, [0, 2]]).any()


@pytest.mark.parametrize("extreme", [[0.0] * 31, [3e38] * 20, [1e-45], [0.0, 3e38]])
def test_extreme_importances_do_no_harm(extreme: list[float]) -> None:
    """What counts for nothing still comes within the range of the values."""
    values, importance = draw_rows("standard_normal", seed=2, rows=20)
    importance[: len(extreme)] = extreme
    decoded = gguf.quants.dequantize(native.quantize(values, "Q4_1", importance), Q4_1)
    assert np.abs(decoded - values).max() < 0.5 * np.abs(values).max()


@pytest.mark.parametrize("isa", native.available_isas())
def test_every_instruction_set_finds_the_same(isa: str) -> None:
    for draw in DRAWS:
        values, importance = draw_rows(draw, seed=3, rows=50)
        values[:16] *= 1e-6  # scales that half precision holds as subnormal numbers
        values[16:32] *= 1e6  # and that it cannot hold
        expected = native.quantize(values, "Q4_1", importance, isa="portable")
        np.testing.assert_array_equal(native.quantize(values, "Q4_1", importance, isa=isa), expected)


# The importances


def open_model(path: Path) -> tuple[DecoderSpec, dict[str, Parameter]]:
    checkpoint = open_checkpoint(path)
    return describe_model(checkpoint.config, checkpoint.tensors)


INPUTS = {"qkv": "self_attn.q_proj", "out": "self_attn.o_proj", "gate_up": "mlp.gate_proj", "down": "mlp.down_proj"}


@pytest.mark.parametrize("name", ["llama", "llama-biases", "mistral", "qwen3"])
def test_importances_are_the_mean_squares_of_inputs(name: str, tiny_model: TinyModel) -> None:
    path = tiny_model(name)
    spec, parameters = open_model(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    seen: dict[str, torch.Tensor] = {}
    for i in range(spec.num_layers - 1):
        for weight, module in INPUTS.items():
            name = f"layers.{i}.{weight}"
            model.get_submodule(f"model.layers.{i}.{module}").register_forward_pre_hook(
                lambda _, inputs, name=name: seen.update({name: inputs[0]})
            )
    with torch.inference_mode():
        model(torch.from_numpy(random_tokens(spec).astype(np.int64)))
    importances = dict(measure_importances(spec, parameters, threads=2))
    assert importances.keys() == seen.keys()
    for name, importance in importances.items():
        expected = seen[name].square().mean(dim=(0, 1)).numpy()
        assert importance.dtype == np.float32
        np.testing.assert_allclose(importance, expected, rtol=0.03, atol=0.001 * expected.mean(), err_msg=name)


def test_importances_do_not_depend_on_threads(tiny_llama: Path) -> None:
    one, two = (dict(measure_importances(*open_model(tiny_llama), threads)) for threads in (1, 2))
    for name, importance in one.items():
        np.testing.assert_array_equal(importance, two[name])


def test_integers_of_4_bits_need_none(tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "4.gguf", "Q4_0")
    assert list(measure_importances(*open_model(tmp_path / "4.gguf"), threads=2)) == []
    write_gguf(tiny_llama, tmp_path / "8.gguf", "Q8_0")
    assert len(list(measure_importances(*open_model(tmp_path / "8.gguf"), threads=2))) == 8


# The whole way


def logits(spec: DecoderSpec, parameters: dict[str, Parameter], reports: list[tuple[int, int]]) -> np.ndarray:
    backend = load(
        spec, parameters, page_size=32, max_batch_tokens=128, max_batch_size=128, max_model_len=256, threads=2,
        dtype="auto", quantization="4bit", device="auto", progress=lambda done, total: reports.append((done, total)),
    )  # fmt: skip
    backend.allocate_kv(8)
    return run_chunks(backend, PROMPT, 100, PAGES)


def test_at_load_or_before(tiny_llama: Path, tmp_path: Path) -> None:
    """octavo quantize makes the same integers, every time, as loading does."""
    spec, parameters = open_model(tiny_llama)
    reports: list[tuple[int, int]] = []
    at_load = logits(spec, parameters, reports)
    assert reports == sorted(reports)
    assert reports[-1] == (sum(p.nbytes for p in parameters.values() if len(p.shape) == 2),) * 2

    for target in ("once", "twice"):
        answer("quantize", tiny_llama, tmp_path / target, "--bits", "4")
    once, twice = ((tmp_path / target / "model.safetensors").read_bytes() for target in ("once", "twice"))
    assert once == twice
    _, before = open_model(tmp_path / "once")
    formats = {name: parameter.parts[0].format for name, parameter in before.items() if len(parameter.shape) == 2}
    in_4_bits = {name for name, format in formats.items() if format == "Q4_1"}
    assert in_4_bits == {f"layers.{i}.{weight}" for i in range(2) for weight in INPUTS}
    assert {formats[name] for name in formats.keys() - in_4_bits} == {"Q8_0"}
    mixed = parameters | {name: before[name] for name in in_4_bits}
    np.testing.assert_array_equal(logits(spec, mixed, []), at_load)
