"""What an engine's plan says to people, for each backend."""

from pathlib import Path

import pytest

from octavo.backends.base import Footprint
from octavo.config import EngineConfig
from octavo.engine import loading
from octavo.engine.engine_plan import make_plan
from octavo.errors import OutOfMemory


@pytest.mark.parametrize(
    "settings, kernels, weights",
    [
        ({"quantization": "auto"}, "K, 3 threads (one for each available processor)", "as the files store them"),
        ({"threads": 3, "quantization": "none"}, "K, 3 threads (as set)", "bfloat16"),
        ({"device": "cuda", "quantization": "auto"}, "K", "bfloat16"),
        ({"device": "cuda", "quantization": "8bit"}, "K", "8 bits"),
        ({"backend": "torch", "dtype": "float32"}, "K, 3 threads (one for each available processor)", "float32"),
    ],
)
def test_lines(settings: dict[str, object], kernels: str, weights: str) -> None:
    plan = make_plan(EngineConfig(**settings), Footprint("K", 2**30, 2**20), 512, 3, 2**30, "half")
    lines = plan.lines()
    assert lines["kernels"] == kernels
    assert lines["weights"] == f"1.00 GiB, {weights}"


@pytest.mark.parametrize(
    "settings, advice",
    [
        ({}, r"^the weights need \S+ MiB and 0 MiB are free; use a smaller model, or quantization 4bit$"),
        ({"quantization": "4bit"}, "; use a smaller model$"),
        (
            {"data_parallel_size": 2, "quantization": "4bit"},
            "weights of 2 engines .*a smaller model, or fewer engines$",
        ),
    ],
)
def test_weights_that_do_not_fit(
    settings: dict[str, object], advice: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_free_memory", lambda config: 0)
    with pytest.raises(OutOfMemory, match=advice):
        loading.plan_engine(EngineConfig(**settings), tiny_llama)
