"""Linears of 8-bit and 4-bit weights, on every instruction set of this machine: against numpy, and bit for bit."""

import math
from dataclasses import dataclass, replace

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

native = pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")

from octavo.backends.torch import load as load_torch  # noqa: E402
from octavo.model.spec import DecoderSpec  # noqa: E402
from octavo.weights.tensor import Parameter, Tensor  # noqa: E402
from random_model import PAGES, SPECS, TOKENS, load, random_parameters  # noqa: E402
from step_batches import run_chunks, step_batch  # noqa: E402

ISAS = native.available_isas()
VOCAB = 40
GROUP = 32  # values that share a scale
FORMATS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
Parts = list[tuple[np.ndarray, str, np.ndarray | None]]


def random_blocks(format: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Any integers, with scales that make values of about 1: uint8 [rows, bytes per row]."""
    rng = np.random.default_rng([seed, rows, columns])
    values, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[format]]
    blocks = rng.integers(0, 256, (rows, columns // values, size), np.uint8)
    halves = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
    for at in halves.get(format, [0, 2] if format.endswith("_1") else [0]):
        sign = rng.choice([-1, 1], blocks.shape[:2])
        scale = (sign * rng.uniform(0.5, 2, blocks.shape[:2]) / 2 ** (12 if "K" in format else 6)).astype(np.float16)
        blocks[:, :, at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def dequantized(stored: np.ndarray, format: str) -> np.ndarray:
    return np.asarray(gguf.quants.dequantize(stored, GGMLQuantizationType[format]), np.float32)


def float32(values: np.ndarray) -> Parts:
    return [(np.ascontiguousarray(values, np.float32).view(np.uint8), "F32", None)]


def quantized(x: np.ndarray) -> np.ndarray:
    """float32 rows to the int8 that linears multiply, scaled back: float64."""
    groups = np.pad(x, [(0, 0), (0, -x.shape[1] % GROUP)]).reshape(len(x), -1, GROUP)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    back = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    values = np.rint(groups * back).astype(np.float64) * (largest / np.float32(127))
    return values.reshape(len(x), -1)[:, : x.shape[1]]


@dataclass(frozen=True)
class Linear:
    """The embedding of each token, normed, quantized and multiplied by a weight."""

    program: "native.Program"
    normed: np.ndarray  # float32 [VOCAB, columns]

    def run(self, tokens: list[int]) -> np.ndarray:
        result: np.ndarray = self.program.logits(step_batch([(tokens, 0, [0, 1, 2, 3, 4])]))
        return result


def linear(isa: str, parts: Parts, rows: int, columns: int, encoding: "native.Encoding | None" = None) -> Linear:
    """The embedding's rows have a mean square of 1, so that the norm, but for the last bit, changes nothing."""
    program = native.Program(
        isa=isa, processors=[[0], [1]], vocab=VOCAB, heads=1, kv_heads=1, head_dim=16, layers=1, norm_eps=0.0,
        page_size=32, max_rows=160, max_sampled=160, frequencies=[1.0] * 8,
    )  # fmt: skip
    signs = np.random.default_rng(columns).choice(np.float32([-1, 1]), (VOCAB, columns))
    scale = np.random.default_rng(7).uniform(0.05, 3, columns).astype(np.float32)
    table = program.weight(VOCAB, columns)
    weight = program.weight(rows, columns, encoding or native.encoding_for([format for _, format, _ in parts]))
    x = program.norm(program.embed(table), program.vector(scale))
    program.finish(program.sampled_rows(program.linear(x, weight, -1, -1)))
    program.pack(table, float32(signs), VOCAB, columns)
    program.pack(weight, parts, rows, columns)
    program.allocate_kv(5)
    return Linear(program, signs * scale)


def assert_close(result: np.ndarray, reference: np.ndarray) -> None:
    """All that differs is the order of float sums and, in the embedding's norm, nothing: its rows are signs."""
    assert np.linalg.norm(result - reference) < 2e-6 * np.linalg.norm(reference)


def test_encodings_are_as_small_as_they_can_be() -> None:
    bits = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4, "Q5_0": 8, "Q4_K": 4, "Q6_K": 8, "F16": 16, "BF16": 16, "W4G32": 4}
    assert {format: native.encoding_for([format]).bits for format in bits} == bits
    assert native.encoding_for(["Q4_1"]) == native.Encoding.W4
    assert native.encoding_for(["Q4_K", "Q6_K"]).bits == 8
    assert native.encoding_for(["Q4_0", "F32"]) == native.Encoding.BF16


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_each_format_multiplies_its_own_integers(isa: str, format: str) -> None:
    stored = random_blocks(format, 50, 768)
    layer = linear(isa, [(stored, format, None)], 50, 768)
    reference = quantized(layer.normed) @ dequantized(stored, format).T.astype(np.float64)
    assert_close(layer.run(list(range(VOCAB))), reference)


MIXED = [("Q4_K", "Q6_K"), ("Q4_0", "Q4_1", "Q8_0"), ("Q5_1", "Q2_K"), ("Q5_0", "Q8_0"), ("Q4_1", "Q5_K")]


@pytest.mark.parametrize("formats", MIXED)
@pytest.mark.parametrize("isa", ISAS)
def test_parts_of_several_formats_share_an_encoding(isa: str, formats: tuple[str, ...]) -> None:
    order = np.random.default_rng(0).permutation(24)
    stored = [random_blocks(format, 24, 512, seed) for seed, format in enumerate(formats)]
    layer = linear(isa, [(s, f, order) for s, f in zip(stored, formats, strict=True)], 24 * len(formats), 512)
    weight = np.concatenate([dequantized(s, f)[order] for s, f in zip(stored, formats, strict=True)])
    reference = quantized(layer.normed) @ weight.T.astype(np.float64)
    assert_close(layer.run(list(range(VOCAB))), reference)


def test_w4g32_and_w8g32() -> None:
    """What AWQ and GPTQ checkpoints become: float scales and minima, then integers, the 8-bit ones signed."""
    rng = np.random.default_rng(0)
    for format, (low, high) in {"W4G32": (0, 16), "W8G32": (-128, 128)}.items():
        integers = rng.integers(low, high, (20, 3, 32))
        scale = rng.uniform(0.01, 0.1, (20, 3, 1)).astype(np.float16).astype(np.float32)
        minimum = -scale * rng.integers(0, 16, (20, 3, 1)).astype(np.float32)
        packed = (integers[..., :16] | integers[..., 16:] << 4) if format == "W4G32" else integers
        fields = [scale.view(np.uint8), minimum.view(np.uint8), packed.astype(np.uint8)]
        stored = np.concatenate(fields, axis=2).reshape(20, -1)
        layer = linear(ISAS[0], [(stored, format, None)], 20, 96)
        weight = (scale * integers + minimum).reshape(20, 96)
        assert_close(layer.run(list(range(VOCAB))), quantized(layer.normed) @ weight.T.astype(np.float64))


SHAPES = [(32, 1), (64, 17), (96, 100), (576, 16 * 7), (1536, 33)]


@pytest.mark.parametrize("columns, rows", SHAPES)
@pytest.mark.parametrize("format", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_depend_on_its_batch(isa: str, format: str, columns: int, rows: int) -> None:
    stored = random_blocks(format, rows, columns)
    layer = linear(isa, [(stored, format, None)], rows, columns)
    alone = np.concatenate([layer.run([token]) for token in range(20)])
    reference = quantized(layer.normed) @ dequantized(stored, format).T.astype(np.float64)
    assert_close(alone, reference[:20])
    for count in [*range(1, 20), 31, 32, 33, 64, 65, 128, 129, 160]:
        tokens = [(7 * i) % 20 for i in range(count)]
        np.testing.assert_array_equal(layer.run(tokens), alone[tokens])


def test_quantizing_to_4_bits_at_load_is_quantizing_before() -> None:
    values = np.random.default_rng(3).standard_normal((50, 96)).astype(np.float32)
    at_load = linear(ISAS[0], float32(values), 50, 96, native.Encoding.W4)
    before = linear(ISAS[0], [(as_format(values, "Q4_1"), "Q4_1", None)], 50, 96)
    np.testing.assert_array_equal(at_load.run(list(range(VOCAB))), before.run(list(range(VOCAB))))


def rotated(rows: np.ndarray) -> np.ndarray:
    """Walsh-Hadamard transforms, in float64: of every 64 columns; then of as many such blocks as are a power of two."""
    x = np.pad(rows, [(0, 0), (0, -rows.shape[1] % 64)]).astype(np.float64)
    count = x.shape[1] // 64
    x = x.reshape(len(x), count, 64) @ hadamard(64)
    power = 2 ** (count.bit_length() - 1)
    for start in {0: None, count - power: None}:
        x[:, start : start + power] = np.einsum("ij,njk->nik", hadamard(power), x[:, start : start + power])
    return x.reshape(len(x), -1)


def hadamard(n: int) -> np.ndarray:
    """Orthonormal, of a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(n)


def row_scaled(rows: np.ndarray) -> np.ndarray:
    """Rows to int8 with a scale each, and scaled back."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / 127
    return np.rint(rows / scale) * scale


@pytest.mark.parametrize("columns, rows", [*SHAPES, (50, 50)])
@pytest.mark.parametrize("isa", ISAS)
def test_8_bits_at_load_are_rotated_and_scaled_by_row(isa: str, columns: int, rows: int) -> None:
    values = np.random.default_rng(3).standard_normal((rows, columns)).astype(np.float32)
    layer = linear(isa, float32(values), rows, columns, native.Encoding.W8)
    alone = np.concatenate([layer.run([token]) for token in range(VOCAB)])
    reference = row_scaled(rotated(layer.normed)) @ row_scaled(rotated(values)).T
    # A last bit may send what is halfway between two integers to the other one.
    assert np.linalg.norm(alone - reference) < 1e-3 * np.linalg.norm(reference)
    for count in [*range(1, 20), 31, 32, 33, 64, 65, 128, 129, 160]:
        tokens = [(7 * i) % VOCAB for i in range(count)]
        np.testing.assert_array_equal(layer.run(tokens), alone[tokens])


def as_format(values: np.ndarray, format: str) -> np.ndarray:
    stored: np.ndarray = native.quantize(np.ascontiguousarray(values), format)
    return stored


@pytest.mark.parametrize("draw", ["standard_normal", "standard_cauchy", "random", "zero", "one"])
def test_quantizing_is_no_worse_than_rounding(draw: str) -> None:
    """Of every group of 32, against the plain rounding of the gguf package."""
    rng = np.random.default_rng(5)
    constants = {"zero": np.zeros((500, 64)), "one": np.ones((500, 64))}
    values = np.float32(constants[draw] if draw in constants else getattr(rng, draw)((500, 64)))

    def errors(stored: np.ndarray, format: str) -> np.ndarray:
        difference = dequantized(stored, format).astype(np.float64) - values
        return np.square(difference).reshape(-1, GROUP).sum(axis=1)

    ours = errors(as_format(values, "Q4_1"), "Q4_1")
    plain = errors(gguf.quants.quantize(values, GGMLQuantizationType.Q4_1), "Q4_1")
    assert (ours <= plain * 1.001 + 1e-9).all()
    if draw.startswith("standard"):
        assert ours.mean() < 0.85 * plain.mean()
    ours = errors(as_format(values, "Q8_0"), "Q8_0")
    plain = errors(gguf.quants.quantize(values, GGMLQuantizationType.Q8_0), "Q8_0")
    assert ours.sum() <= 1.01 * plain.sum()


def quantized_parameters(spec: DecoderSpec, formats: list[str]) -> dict[str, Parameter]:
    """Weights in several formats: a third of the rows, or the rest, in each."""
    parameters = random_parameters(spec)
    for name, parameter in parameters.items():
        if len(parameter.shape) == 1:
            continue
        values = parameter.parts[0].float32()
        cuts = [len(values) * i // len(formats) for i in range(len(formats) + 1)]
        parts = []
        for format, start, stop in zip(formats, cuts, cuts[1:], strict=False):
            stored = gguf.quants.quantize(values[start:stop], GGMLQuantizationType[format])
            parts.append(Tensor(name, values[start:stop].shape, format, stored))
        parameters[name] = Parameter(tuple(parts))
    return parameters


@pytest.mark.parametrize("formats", [["Q8_0"], ["Q4_0"], ["Q4_1"], ["Q5_0", "Q5_1", "Q4_1"]], ids=str)
@pytest.mark.parametrize("name", ["plain", "head_dim 64, group of 3", "head_dim 128, no groups"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_model_runs_from_its_own_integers(
    isa: str, name: str, formats: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference has the same weights: what differs is that activations are rounded to 8 bits."""
    monkeypatch.setenv("OCTAVO_ISA", isa)
    spec = replace(SPECS[name], intermediate_size=128)
    parameters = quantized_parameters(spec, formats)
    reference = run_chunks(load(spec, load_torch, dtype="float32", parameters=parameters), TOKENS, 150, PAGES)
    backend = load(spec, parameters=parameters)
    whole = run_chunks(backend, TOKENS, 150, PAGES)
    assert np.linalg.norm(whole - reference) < 0.03 * np.linalg.norm(reference)
    np.testing.assert_array_equal(run_chunks(backend, TOKENS, 7, PAGES), whole)
