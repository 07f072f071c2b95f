"""Linears whose columns are summed in spans: against numpy, and the same bits from ranks that have some spans each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

native = pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")

from test_integer_weights import dequantized, quantized, random_blocks, rotated, row_scaled  # noqa: E402
from test_kernels import to_bf16  # noqa: E402

from octavo.model.spans import UNIT, span_ends  # noqa: E402
from random_model import PAGES, PLAIN, TOKENS, load  # noqa: E402
from step_batches import run_chunks, step_batch  # noqa: E402

ISAS = native.available_isas()
VOCAB = 40
# A weight's recipe: the format that it is stored in, and the encoding that it is packed in.
RECIPES = {
    "bf16": ("F32", native.Encoding.BF16),
    "w8": ("F32", native.Encoding.W8),
    "w4": ("F32", native.Encoding.W4),
    "Q4_0": ("Q4_0", native.encoding_for(["Q4_0"])),
    "Q8_0": ("Q8_0", native.encoding_for(["Q8_0"])),
}
BYTES = {"F32": (1, 4), "Q4_0": (32, 18), "Q8_0": (32, 34)}  # columns and bytes of a block


@dataclass(frozen=True)
class Inputs:
    """What a linear multiplies: x = signs * scale, and a weight as stored, uint8 [rows, bytes per row]."""

    signs: np.ndarray  # float32 [VOCAB, columns]
    scale: np.ndarray  # float32 [columns]
    stored: np.ndarray
    format: str

    def columns(self, begin: int, end: int) -> "Inputs":
        values, size = BYTES[self.format]
        stored = self.stored[:, begin // values * size : -(-end // values) * size]
        return Inputs(self.signs[:, begin:end], self.scale[begin:end], np.ascontiguousarray(stored), self.format)


def inputs(format: str, rows: int, columns: int) -> Inputs:
    rng = np.random.default_rng([rows, columns])
    signs = rng.choice(np.float32([-1, 1]), (VOCAB, columns))
    scale = to_bf16(rng.uniform(0.05, 3, columns) * rng.choice([1, 1, 20], columns))
    if format == "F32":
        stored = rng.standard_normal((rows, columns)).astype(np.float32).view(np.uint8)
    else:
        stored = random_blocks(format, rows, columns)
    return Inputs(signs, scale, stored, format)


def products(
    isa: str, x: Inputs, encoding: "native.Encoding", ends: Sequence[int], tokens: Sequence[int], threads: int = 2
) -> np.ndarray:
    """The linear's sums for these tokens: float32 [tokens, rows]. Rows of signs have a mean square of 1: norm = x."""
    rows, columns = len(x.stored), x.signs.shape[1]
    program = native.Program(
        isa=isa, processors=[[]] * threads, vocab=VOCAB, heads=1, kv_heads=1, head_dim=16, layers=1, norm_eps=0.0,
        page_size=32, max_rows=160, max_sampled=160, frequencies=[1.0] * 8,
    )  # fmt: skip
    table, weight = program.weight(VOCAB, columns), program.weight(rows, columns, encoding, ends)
    normed = program.norm(program.embed(table), program.vector(x.scale))
    program.finish(program.sampled_rows(program.linear(normed, weight, -1, -1)))
    program.pack(table, [(x.signs.view(np.uint8), "F32", None)], VOCAB, columns)
    program.pack(weight, [(x.stored, x.format, None)], rows, columns)
    program.allocate_kv(5)
    result: np.ndarray = program.logits(step_batch([(list(tokens), 0, [0, 1, 2, 3, 4])]))
    return result


def tree(sums: list[np.ndarray]) -> np.ndarray:
    """((s0 + s1) + (s2 + s3)) + ..."""
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def of_ranks(
    isa: str, x: Inputs, encoding: "native.Encoding", ends: Sequence[int], tokens: Sequence[int], ranks: int
) -> list[np.ndarray]:
    """The sums of each rank, which has a program with its own spans of the weight and of x only."""
    each = len(ends) // ranks
    sums = []
    for rank in range(ranks):
        own = ends[rank * each : (rank + 1) * each]
        begin = ends[rank * each - 1] if rank else 0
        sums.append(products(isa, x.columns(begin, own[-1]), encoding, [end - begin for end in own], tokens))
    return sums


ENDS = {
    "even": [64 * (i + 1) for i in range(8)],
    "uneven": [64, 192, 256, 384, 448, 576, 640, 768],
    "four": [192, 384, 576, 768],
    "two": [320, 640],
    "part of a unit": [64, 128, 192, 224],
}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("isa", ISAS)
def test_ranks_add_up_to_the_same_bits(isa: str, recipe: str, ends: list[int]) -> None:
    format, encoding = RECIPES[recipe]
    for rows, count in [(50, 40), (130, 7), (33, 1)]:
        x, tokens = inputs(format, rows, ends[-1]), list(range(count))
        whole = products(isa, x, encoding, ends, tokens)
        for ranks in (2, 4, 8):
            if ranks <= len(ends):
                sums = of_ranks(isa, x, encoding, ends, tokens, ranks)
                np.testing.assert_array_equal(tree(sums), whole)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("isa", ISAS)
def test_spans_agree_with_numpy(isa: str, recipe: str) -> None:
    """Each span computed by numpy from its own columns, then added in the tree."""
    format, encoding = RECIPES[recipe]
    ends = ENDS["uneven"]
    own = inputs(format, 50, ends[-1])
    x = (own.signs * own.scale).astype(np.float32)
    weight = own.stored.view(np.float32) if format == "F32" else dequantized(own.stored, format)
    spans = []
    for begin, end in zip([0, *ends], ends, strict=False):
        a, b = x[:, begin:end], weight[:, begin:end]
        if recipe == "w8":
            a, b = row_scaled(rotated(a)), row_scaled(rotated(b))
        elif recipe == "bf16":
            a, b = a.astype(np.float64), to_bf16(b).astype(np.float64)
        else:
            a = quantized(a)
            b = dequantized(native.quantize(np.ascontiguousarray(b), "Q4_1"), "Q4_1") if recipe == "w4" else b
        spans.append((a @ b.T.astype(np.float64)).astype(np.float32))
    result, reference = products(isa, own, encoding, ends, range(VOCAB)), tree(spans)
    # In w8, a last bit may send what is halfway between two integers to the other one.
    assert np.linalg.norm(result - reference) < (1e-3 if recipe == "w8" else 2e-6) * np.linalg.norm(reference)


SPEC_SIZES = st.tuples(st.integers(1, 64), st.integers(1, 8).map(lambda n: 16 * n), st.integers(1, 20_000))


@given(SPEC_SIZES)
def test_spans_are_even_and_of_whole_units(sizes: tuple[int, int, int]) -> None:
    heads, head_dim, intermediate = sizes
    spec = replace(PLAIN, num_heads=heads, num_kv_heads=1, head_dim=head_dim, intermediate_size=intermediate)
    out, down = span_ends(spec, "layers.0.out"), span_ends(spec, "layers.2.down")
    for ends, columns in ((out, heads * head_dim), (down, intermediate)):
        assert len(ends) in (1, 2, 4, 8)
        assert ends[-1] == columns
        assert all(end % UNIT == 0 for end in ends[:-1])
    of_out, of_down = np.diff([0, *out]), np.diff([0, *down])
    assert set(of_out) == {heads // len(out) * head_dim}  # whole heads, as many in each
    assert np.ptp(-(-of_down // UNIT)) <= 1
    assert len(down) == 8 or len(down) > intermediate / UNIT / 2
    assert span_ends(spec, "layers.0.qkv") == span_ends(spec, "head") == ()


@settings(max_examples=25, deadline=None)
@given(
    isa=st.sampled_from(ISAS), recipe=st.sampled_from(sorted(RECIPES)), count=st.sampled_from([2, 4, 8]),
    sizes=st.lists(st.integers(1, 4), min_size=8, max_size=8), rows=st.integers(1, 120), tokens=st.integers(1, 40),
    threads=st.integers(1, 3),
)  # fmt: skip
def test_ranks_threads_and_batches_never_change_a_bit(
    isa: str, recipe: str, count: int, sizes: list[int], rows: int, tokens: int, threads: int
) -> None:
    format, encoding = RECIPES[recipe]
    ends = np.cumsum(np.multiply(sizes[:count], UNIT)).tolist()
    own = inputs(format, rows, ends[-1])
    whole = products(isa, own, encoding, ends, range(tokens), threads)
    np.testing.assert_array_equal(tree(of_ranks(isa, own, encoding, ends, range(tokens), count)), whole)
    np.testing.assert_array_equal(products(isa, own, encoding, ends, [tokens - 1], 1), whole[-1:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_sum_of_ranks_is_the_tree_then_bias_then_residual(isa: str, ranks: int) -> None:
    rng = np.random.default_rng(ranks)
    *partials, bias, residual = rng.standard_normal((ranks + 2, 48)).astype(np.float32)
    np.testing.assert_array_equal(native.sum_partials(isa, partials), tree(partials))
    expected = (tree(partials) + bias) + residual
    np.testing.assert_array_equal(native.sum_partials(isa, partials, bias, residual), expected)
    with pytest.raises(ValueError, match="same size"):
        native.sum_partials(isa, [*partials[1:], np.zeros(16, np.float32)], bias)
    with pytest.raises(ValueError, match="1, 2, 4 or 8"):
        native.sum_partials(isa, [*partials, *partials, *partials])


@pytest.mark.parametrize(
    "ends, message",
    [
        ([64, 128, 192], "1, 2, 4 or 8"),
        ([128, 128], "must have columns"),
        ([96, 128], "multiples of 64"),
        ([64], "last"),
    ],
)
def test_spans_that_kernels_cannot_compute_are_refused(ends: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        products(ISAS[0], inputs("F32", 16, 128), native.Encoding.BF16, ends, [0])


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("isa", ISAS)
def test_chunks_do_not_change_a_model_with_spans(isa: str, quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_ISA", isa)
    spec = replace(PLAIN, num_heads=8, head_dim=32, hidden_size=64, intermediate_size=600, num_layers=2, windows=(0, 0))
    assert len(span_ends(spec, "layers.0.out")) == 4 and len(span_ends(spec, "layers.0.down")) == 8
    backend = load(spec, quantization=quantization)
    whole = run_chunks(backend, TOKENS, 150, PAGES)
    np.testing.assert_array_equal(run_chunks(backend, TOKENS, 7, PAGES), whole)
