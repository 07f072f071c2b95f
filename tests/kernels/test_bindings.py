"""Arrays that Python gives to the native module: copied, held as long as they are read, or refused."""

import gc
from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

native = pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")

from test_kernels import ISAS, VOCAB, Layers, linear, random, stored  # noqa: E402

from octavo.backends.base import PoolingBatch, SamplingBatch, StepBatch  # noqa: E402
from step_batches import step_batch  # noqa: E402

COLUMNS, WIDTH, TOKENS = 32, 64, list(range(20))
REFUSED = (TypeError, ValueError)


@pytest.fixture
def layers() -> Layers:
    return linear(ISAS[0], COLUMNS, WIDTH)[0]


def strided(array: np.ndarray) -> np.ndarray:
    """The same values with gaps between them."""
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "strided": strided,
    "reversed": lambda array: array[::-1].copy()[::-1],
    "column-major": np.asfortranarray,
    "read-only": lambda array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_copies_another_layout_for_as_long_as_it_reads_it(layers: Layers, layout: str) -> None:
    """Four equal parts: were a part's copy freed too early, the next part's would take its place in memory."""
    weight, order = random(WIDTH, COLUMNS, seed=9), np.arange(16)[::-1]
    change = LAYOUTS[layout]
    quarters = [np.ascontiguousarray(part[order]) for part in np.split(weight, 4)]
    parts = [(change(part.view(np.uint8)), "F32", change(order.astype(np.int64))) for part in quarters]
    layers.program.pack(1, parts, WIDTH, COLUMNS)
    result = layers.run(TOKENS)
    layers.program.pack(1, stored(weight), WIDTH, COLUMNS)
    np.testing.assert_array_equal(result, layers.run(TOKENS))


def test_pack_refuses_other_dtypes_and_shapes(layers: Layers) -> None:
    weight = random(WIDTH, COLUMNS, seed=9)
    bytes_ = weight.view(np.uint8)
    for data in (weight, bytes_.view(np.int8), bytes_.astype(np.uint16), bytes_.ravel(), bytes_[None], None, "bytes"):
        with pytest.raises(REFUSED):
            layers.program.pack(1, [(data, "F32", None)], WIDTH, COLUMNS)
    for order in (np.arange(WIDTH - 1), np.arange(WIDTH)[None], np.arange(WIDTH) - 1, np.arange(WIDTH) + 1, "order"):
        with pytest.raises(REFUSED):
            layers.program.pack(1, [(bytes_, "F32", order)], WIDTH, COLUMNS)
    for importance in (np.ones(COLUMNS + 1, np.float32), np.ones((1, COLUMNS), np.float32)):
        with pytest.raises(REFUSED):
            layers.program.pack(1, stored(weight), WIDTH, COLUMNS, importance)


@pytest.mark.parametrize("rows, columns", [(WIDTH // 2, COLUMNS), (WIDTH * 2, COLUMNS), (WIDTH, 2 * COLUMNS), (0, 0)])
def test_pack_refuses_another_shape_than_was_recorded(layers: Layers, rows: int, columns: int) -> None:
    with pytest.raises(ValueError):
        layers.program.pack(1, stored(random(rows, columns)) if rows else [], rows, columns)
    with pytest.raises(IndexError):
        layers.program.pack(99, stored(random(WIDTH, COLUMNS)), WIDTH, COLUMNS)


def test_vectors_are_copied_from_any_layout(layers: Layers) -> None:
    """A bias as float64, and with gaps, is the same bias."""
    bias = random(WIDTH, seed=3)
    expected = layers.run(TOKENS)
    for change in (strided, lambda x: x.astype(np.float64), lambda x: x[::-1].copy()[::-1]):
        program = native.Program(
            isa=ISAS[0], processors=[[0]], vocab=VOCAB, heads=1, kv_heads=1, head_dim=16, layers=1, norm_eps=0.1,
            page_size=32, max_rows=32, max_sampled=32, frequencies=[1.0] * 8,
        )  # fmt: skip
        table, weight = program.weight(VOCAB, COLUMNS), program.weight(WIDTH, COLUMNS)
        x = program.norm(program.embed(table), program.vector(strided(np.ones(COLUMNS, np.float32))))
        program.finish(program.sampled_rows(program.linear(x, weight, program.vector(change(bias)), -1)))
        program.pack(table, stored(layers.embed), VOCAB, COLUMNS)
        program.pack(weight, stored(random(WIDTH, COLUMNS, seed=2)), WIDTH, COLUMNS)
        program.allocate_kv(5)
        np.testing.assert_array_equal(program.logits(step_batch([(TOKENS, 0, [0])])), expected)
    for wrong in (np.ones((2, 2), np.float32), "values", None):
        with pytest.raises(REFUSED):
            layers.program.vector(wrong)


def wrong_arrays(array: np.ndarray) -> list[Any]:
    other = np.float64 if array.dtype.kind == "f" else np.int16
    longer = np.concatenate([array, array[-1:] if len(array) else np.ones(1, array.dtype)])
    return [strided(np.concatenate([longer, longer])), array.astype(other), array[None], longer, None, "array"]


@pytest.mark.parametrize(
    "field", [field.name for field in fields(StepBatch) if field.name not in ("sampling", "pooling", "places")]
)
def test_a_step_refuses_wrong_arrays(layers: Layers, field: str) -> None:
    batch = step_batch([(TOKENS, 0, [0, 1])])
    wrong = wrong_arrays(getattr(batch, field))
    if field == "page_tables":  # a table of another width is right
        wrong = [strided(batch.page_tables), batch.page_tables.astype(np.int64), batch.page_tables[0], None]
    for array in wrong:
        with pytest.raises(REFUSED):
            layers.program.step(replace(batch, **{field: array}))
    for array in wrong[:2]:
        with pytest.raises(REFUSED):
            layers.program.logits(replace(batch, **{field: array}))


@pytest.mark.parametrize("field", [field.name for field in fields(SamplingBatch)])
def test_sampling_refuses_wrong_arrays(layers: Layers, field: str) -> None:
    batch = step_batch([(TOKENS, 0, [0, 1])])
    for array in wrong_arrays(getattr(batch.sampling, field)):
        if field in ("history", "masks") and np.shape(array) == (1,):
            continue  # tokens that no row's offsets reach
        with pytest.raises(REFUSED):
            layers.program.step(replace(batch, sampling=replace(batch.sampling, **{field: array})))


def labels_of_rows(rows: list[int], tokens: list[int]) -> PoolingBatch:
    """A PoolingBatch of labels, for a program that sums no rows."""
    nothing = np.zeros(0, np.int32)
    return PoolingBatch(nothing, nothing, np.zeros((0, 0)), np.array(rows, np.int32), np.array(tokens, np.int32))


@pytest.mark.parametrize("field", [field.name for field in fields(PoolingBatch)])
def test_pooling_refuses_wrong_arrays(layers: Layers, field: str) -> None:
    batch, pooling = step_batch([(TOKENS, 0, [0, 1])]), labels_of_rows([3, 3], [5, 6])
    if field == "sums":
        wrong = [np.zeros((1, 0)), np.zeros((0, 1)), np.zeros((0, 0), np.float32), np.zeros(0), None]
    else:
        wrong = wrong_arrays(getattr(pooling, field))
    for array in wrong:
        with pytest.raises(REFUSED):
            layers.program.step(replace(batch, pooling=replace(pooling, **{field: array})))


@pytest.mark.parametrize("row, token", [(-1, 0), (20, 0), (0, -1), (0, WIDTH)])
def test_labels_outside_of_the_batch_are_refused(layers: Layers, row: int, token: int) -> None:
    with pytest.raises(ValueError, match="label"):
        layers.program.step(replace(step_batch([(TOKENS, 0, [0])]), pooling=labels_of_rows([row], [token])))


class Changing(SimpleNamespace):
    """An object whose arrays live no longer than the access to them."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return value.copy() if isinstance(value, np.ndarray) else value


def changing(batch: Any) -> Changing:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    parts = (SamplingBatch, PoolingBatch)
    return Changing(**{name: changing(x) if isinstance(x, parts) else x for name, x in values.items()})


def test_a_step_holds_the_arrays_that_it_reads(layers: Layers) -> None:
    """Every field is read once and its array kept, whatever the batch does with its own reference."""
    batch = step_batch([(TOKENS, 0, [0, 1])])
    np.testing.assert_array_equal(layers.program.step(changing(batch))[0], layers.program.step(batch)[0])
    np.testing.assert_array_equal(layers.program.logits(changing(batch)), layers.program.logits(batch))
    batch = replace(batch, pooling=labels_of_rows([3, 7], [5, 6]))
    np.testing.assert_array_equal(layers.program.step(changing(batch))[6], layers.program.logits(batch)[[3, 7], [5, 6]])


def test_an_exported_page_outlives_the_pool(layers: Layers) -> None:
    content = np.random.default_rng(0).integers(0, 256, layers.program.page_bytes, np.uint8)
    layers.program.import_page(3, content)
    page = layers.program.export_page(3)
    layers.program.allocate_kv(2)
    gc.collect()
    np.testing.assert_array_equal(page, content)
    with pytest.raises(ValueError, match="not in the KV pool"):
        layers.program.export_page(3)


def test_import_page_refuses_wrong_arrays(layers: Layers) -> None:
    content = np.zeros(layers.program.page_bytes, np.uint8)
    for wrong in (strided(content), content.view(np.int8), content[None], content[1:], content.view(np.float32), None):
        with pytest.raises(REFUSED):
            layers.program.import_page(0, wrong)


def test_quantizing_refuses_wrong_arrays() -> None:
    values = random(4, 64)
    for wrong in (strided(values), values.astype(np.float64), values[0], values[:, :33].copy(), None):
        with pytest.raises(REFUSED):
            native.quantize(wrong, "Q8_0")
    for importance in (np.ones(63, np.float32), np.ones((1, 64), np.float32)):
        with pytest.raises(REFUSED):
            native.quantize(values, "Q4_1", importance)
    importance = np.random.default_rng(0).lognormal(0, 1, 64).astype(np.float32)
    expected = native.quantize(values, "Q4_1", importance)
    np.testing.assert_array_equal(native.quantize(values, "Q4_1", strided(importance)), expected)
    for format in ("Q4_0", "Q9_X", ""):
        with pytest.raises(ValueError):
            native.quantize(values, format)


def test_dequantizing_refuses_wrong_arrays() -> None:
    stored, out = np.zeros((4, 64 // 32 * 34), np.uint8), np.zeros((4, 64), np.float32)
    native.dequantize(8, stored, out)
    read_only = out.copy()
    read_only.flags.writeable = False
    for wrong in (strided(stored), stored.view(np.int8), stored[0], stored[:3], stored[:, 1:].copy(), None):
        with pytest.raises(REFUSED):
            native.dequantize(8, wrong, out)
    for wrong in (strided(out), out.astype(np.float64), out[0], out[:3], out[:, :32].copy(), read_only, None):
        with pytest.raises(REFUSED):
            native.dequantize(8, stored, wrong)


@pytest.mark.parametrize("wrong", range(6))
def test_sample_refuses_wrong_arrays(wrong: int) -> None:
    rows = 3
    arrays: list[Any] = [
        random(rows, VOCAB), np.zeros(rows, np.int32), np.zeros(rows, np.float32), np.zeros(rows, np.int32),
        np.zeros((rows, 1), np.int32), np.zeros((rows, 1), np.float32),
    ]  # fmt: skip

    def sample(logits: Any, *results: Any) -> None:
        native.sample(ISAS[0], logits, SamplingBatch.greedy(rows), *results)

    sample(*arrays)
    right = arrays[wrong]
    read_only = np.frombuffer(right.tobytes(), right.dtype).reshape(right.shape)
    for array in (strided(np.repeat(right, 2, -1)), right.astype(np.float16), right[None], right[1:], read_only, None):
        with pytest.raises(REFUSED):
            sample(*arrays[:wrong], array, *arrays[wrong + 1 :])
