"""Linears whose columns are summed in spans: against numpy, and the same bits from ranks that have some spans each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

native = pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")

from octavo.model import spans as model_spans  # noqa: E402
from octavo.model.spans import span_ends  # noqa: E402
from random_model import PAGES, PLAIN, TOKENS, load  # noqa: E402
from step_batches import run_chunks, step_batch  # noqa: E402
from test_integer_weights import dequantized, quantized, random_blocks, rotated, row_scaled  # noqa: E402
from test_kernels import to_bf16  # noqa: E402

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
    isa: str, given: Inputs, encoding: "native.Encoding", ends: Sequence[int], tokens: Sequence[int], threads: int = 2
) -> np.ndarray:
    """The linear's sums for these tokens: float32 [tokens, rows]. Rows of signs have a mean square of 1: norm = x."""
    rows, columns = len(given.stored), given.signs.shape[1]
    program = native.Program(
        isa=isa, cores=[-1] * threads, vocab=VOCAB, heads=1, kv_heads=1, head_dim=16, layers=1, norm_eps=0.0,
        page_size=32, max_rows=160, max_sampled=160, frequencies=[1.0] * 8,
    )  # fmt: skip
    table, weight = program.weight(VOCAB, columns), program.weight(rows, columns, encoding, ends)
    x = program.norm(program.embed(table), program.vector(given.scale))
    program.finish(program.sampled_rows(program.linear(x, weight, -1, -1)))
    program.pack(table, [(given.signs.view(np.uint8), "F32", None)], VOCAB, columns)
    program.pack(weight, [(given.stored, given.format, None)], rows, columns)
    program.allocate_kv(5)
    result: np.ndarray = program.logits(step_batch([(list(tokens), 0, [0, 1, 2, 3, 4])]))
    return result


def tree(sums: list[np.ndarray]) -> np.ndarray:
    """((s0 + s1) + (s2 + s3)) + ..."""
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def of_ranks(isa: str, given: Inputs, encoding: "native.Encoding", ends: Sequence[int], tokens: Sequence[int],
             ranks: int) -> list[np.ndarray]:
    """The sums of each rank, which has a program with its own spans of the weight and of x only."""
    each = len(ends) // ranks
    sums = []
    for rank in range(ranks):
        own = ends[rank * each : (rank + 1) * each]
        begin = ends[rank * each - 1] if rank else 0
        sums.append(products(isa, given.columns(begin, own[-1]), encoding, [end - begin for end in own], tokens))
    return sums


ENDS = {
    "even": [64 * (i + 1) for i in range(8)],
    "uneven": [64, 192, 256, 384, 448, 576, 640, 768],
    "four": [192, 384, 576, 768],
    "two": [320, 640],
}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("isa", ISAS)
def test_ranks_add_up_to_the_same_bits(isa: str, recipe: str, ends: list[int]) -> None:
    format, encoding = RECIPES[recipe]
    for rows, count in [(50, 40), (130, 7), (33, 1)]:
        given, tokens = inputs(format, rows, ends[-1]), list(range(count))
        whole = products(isa, given, encoding, ends, tokens)
        for ranks in (2, 4, 8):
            if ranks <= len(ends):
                sums = of_ranks(isa, given, encoding, ends, tokens, ranks)
                np.testing.assert_array_equal(tree(sums), whole)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("isa", ISAS)
def test_spans_agree_with_numpy(isa: str, recipe: str) -> None:
    """Each span computed by numpy from its own columns, then added in the tree."""
    format, encoding = RECIPES[recipe]
    ends = ENDS["uneven"]
    given = inputs(format, 50, ends[-1])
    x = (given.signs * given.scale).astype(np.float32)
    if format == "F32":
        weight = given.stored.view(np.float32)
    else:
        weight = dequantized(given.stored, format)
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
    result, reference = products(isa, given, encoding, ends, range(VOCAB)), tree(spans)
    # In w8, a last bit may send what is halfway between two integers to the other one.
    assert np.linalg.norm(result - reference) < (1e-3 if recipe == "w8" else 2e-6) * np.linalg.norm(reference)
