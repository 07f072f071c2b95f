"""What 8 and 4 bits cost in perplexity on real text, over SmolLM2 as it ships and with its 4-bit grid destroyed."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")

from perplexity import Model, cost, losses, open_model

WINDOWS, MANY_WINDOWS = 3, 6  # of 512 tokens; with 6, 3,066 are scored


def assert_costs_at_most(limit: float, of: np.ndarray, reference: np.ndarray) -> None:
    """With a slack of two standard errors of the difference, taken in pairs: what the choice of text may do to it."""
    more, error = cost(of, reference)
    print(f"{100 * more:+.2f} ± {100 * error:.2f} %")
    assert more <= limit + 2 * error


@pytest.fixture(scope="module")
def windows(many: bool) -> int:
    return MANY_WINDOWS if many else WINDOWS


@pytest.fixture(scope="module")
def model(smollm2: Path, windows: int) -> Model:
    return open_model(str(smollm2), windows)


@pytest.fixture(scope="module")
def in_bfloat16(model: Model) -> np.ndarray:
    reference = losses(model, "none")
    assert len(reference) >= 500 * len(model.windows)
    assert 2 < reference.mean() < 3  # nats: a real model on real text
    return reference


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "limit"), [("auto", 0.005), ("8bit", 0.005), ("4bit", 0.06)])
def test_cost_of_a_setting(quantization: str, limit: float, model: Model, in_bfloat16: np.ndarray) -> None:
    of_setting = losses(model, quantization)
    assert not np.array_equal(of_setting, in_bfloat16)
    assert_costs_at_most(limit, of_setting, in_bfloat16)


@pytest.mark.slow
def test_cost_of_a_kv_cache_in_int8(model: Model, in_bfloat16: np.ndarray) -> None:
    of_setting = losses(model, "none", "int8")
    assert not np.array_equal(of_setting, in_bfloat16)
    assert_costs_at_most(0.003, of_setting, in_bfloat16)


@pytest.mark.slow
def test_ordinary_floats(smollm2: Path, windows: int) -> None:
    shuffled = open_model(str(smollm2), windows, shuffle=True)
    reference = losses(shuffled, "none")
    assert_costs_at_most(0.005, losses(shuffled, "8bit"), reference)
    assert_costs_at_most(0.06, losses(shuffled, "4bit"), reference)
