"""The native dequantizer against the gguf package's, to the bit."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

native = pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")
FORMATS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
ROWS, COLUMNS = 7, 768


def dequantized(kind: GGMLQuantizationType, stored: np.ndarray) -> np.ndarray:
    out = np.full((len(stored), COLUMNS), 7, np.float32)
    native.dequantize(int(kind), stored, out)
    return out


def expected(kind: GGMLQuantizationType, stored: np.ndarray) -> np.ndarray:
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        return stored.view(plain[kind]).astype(np.float32)
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quants.dequantize(stored, kind))


@pytest.mark.parametrize("name", FORMATS)
def test_any_bytes_mean_what_gguf_says(name: str) -> None:
    """Random bytes: every scale (NaN and infinity among them), every quantum."""
    kind = GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert native.row_bytes(int(kind), COLUMNS) == COLUMNS // block * block_bytes
    stored = np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS // block * block_bytes), np.uint8)
    np.testing.assert_array_equal(dequantized(kind, stored), expected(kind, stored))


@pytest.mark.parametrize(
    "name, error", [("BF16", 0.003), ("Q8_0", 0.01), ("Q5_0", 0.06), ("Q5_1", 0.06), ("Q4_0", 0.12), ("Q4_1", 0.12)]
)
def test_what_gguf_quantizes_comes_back(name: str, error: float) -> None:
    """Standard normal values, `error` the root of the mean square."""
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(1).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    result = dequantized(kind, gguf.quants.quantize(values, kind))
    assert np.sqrt(np.square(result - values).mean()) < error


def test_what_does_not_fit_is_refused() -> None:
    assert native.row_bytes(int(GGMLQuantizationType.Q4_K), 255) == 0
    assert native.row_bytes(int(GGMLQuantizationType.IQ2_XXS), 256) == 0
    with pytest.raises(ValueError, match="bytes per row"):
        dequantized(GGMLQuantizationType.Q8_0, np.zeros((ROWS, 100), np.uint8))
