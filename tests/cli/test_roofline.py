"""octavo bench roofline: its report agrees with itself and with the model, and the profile with the clock."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import OCTAVO
from octavo.backends.cpu.backend import CpuBackend
from octavo.bench.roofline import Ceilings, Measured, Work
from octavo.config import EngineConfig
from octavo.engine.loading import load_engine
from step_batches import step_batch

ROOFLINE = [*OCTAVO, "bench", "roofline"]
FLAGS = ("--threads", "1", "--max-batch-size", "8", "--max-batch-tokens", "128", "--kv-cache-memory", "16MiB")


def roofline(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ROOFLINE, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def done(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Report, what was printed, and the plot."""
    folder = tmp_path_factory.mktemp("roofline")
    done = roofline(tiny_llama, *FLAGS, "--output-json", folder / "report.json", "--plot", folder / "plot.svg")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads((folder / "report.json").read_text()), done.stdout, folder / "plot.svg"


def test_steps_fit_the_machine_and_the_model(done: tuple[dict[str, Any], str, Path]) -> None:
    report, printed, _ = done
    steps, ceilings = report["steps"], report["ceilings"]
    decodes = [(step["batch_size"], step["context"]) for step in steps if step["phase"] == "decode"]
    # No batch of 16 or more; of the longer contexts what the model has room for: 480 and the steps. 10 steps are done
    # before the one in the middle.
    assert decodes == [(1, 138), (2, 138), (4, 138), (8, 138), (1, 490)]
    assert [step["context"] for step in steps if step["phase"] == "prefill"] == [511]
    assert ceilings["threads"] == 1
    assert ceilings["bytes_per_second"] > 1e8 and ceilings["operations_per_second"] > 1e8
    assert ceilings["integer_operations_per_second"] > 1e8
    for step in steps:
        assert 0 < step["floor_milliseconds"] < step["milliseconds"] * 1.2
        assert step["achieved"] == pytest.approx(step["floor_milliseconds"] / step["milliseconds"])
        assert step["limited_by"] in ("memory", "compute")
        assert sum(step["shares"].values()) == pytest.approx(1)
        assert all(0 <= share < 1 for share in step["shares"].values())
        assert step["shares"]["linear"] > 0 and step["shares"]["attention"] > 0
        assert f"{step['achieved']:.0%}" in printed
        assert f"{step['phase']} {step['batch_size']} × {step['context']}" in printed


def test_what_must_be_done(done: tuple[dict[str, Any], str, Path]) -> None:
    """Counted by hand for the tiny Llama: 96 wide, 3 layers, 6 heads and 2 kv heads of 32, 160 and 512 outputs."""
    steps = done[0]["steps"]
    layer = 96 * (6 + 2 + 2) * 32 + 6 * 32 * 96 + 3 * 96 * 160
    eight = next(step for step in steps if step["batch_size"] == 8)
    assert eight["bytes"] == {"weight": 2 * (3 * layer + 512 * 96), "kv": 8 * 138 * 3 * 2 * 2 * 32 * 2}
    linear, head = 8 * 2 * 3 * layer, 8 * 2 * 512 * 96
    assert eight["operations"] == {"linear": linear, "attention": 8 * 3 * 6 * 138 * 2 * 2 * 32, "head": head}
    prefill = steps[-1]  # in 4 steps: the weights are read 4 times, but the head
    assert prefill["bytes"]["weight"] == 2 * (4 * 3 * layer + 512 * 96)
    assert prefill["bytes"]["kv"] == (128 + 256 + 384 + 511) * 3 * 2 * 2 * 32 * 2
    assert prefill["operations"]["attention"] == 3 * 6 * (511 * 512 // 2) * 2 * 2 * 32
    assert prefill["operations"]["head"] == 2 * 512 * 96


def test_windows_bound_attention_and_the_cache(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert roofline(tiny_model("mistral"), *FLAGS, "--max-batch-size", 1, "--output-json", file).returncode == 0
    decode = json.loads(file.read_text())["steps"][0]
    assert decode["bytes"]["kv"] == 24 * 3 * 2 * 2 * 32 * 2
    assert decode["operations"]["attention"] == 3 * 6 * 24 * 2 * 2 * 32


def test_the_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    ceilings = Ceilings("any", 1, 100.0, 1000.0, integer_operations_per_second=2000.0)
    reads = Work(weight_bytes=150, kv_bytes=50, linear=10, attention=10, head=10)
    computes = Work(weight_bytes=10, kv_bytes=10, linear=2000, attention=1500, head=500)
    assert reads.floor(ceilings) == (2.0, "memory")
    assert computes.floor(ceilings) == (4.0, "compute")
    assert dataclasses.replace(computes, integers=2500).floor(ceilings) == (2.75, "compute")
    report = Measured("prefill", 1, 9, 9, 12.0, [reads, computes], {}).report(ceilings)
    assert (report["floor_milliseconds"], report["limited_by"], report["achieved"]) == (6000, "compute", 0.5)


def test_the_plot(done: tuple[dict[str, Any], str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    picture = done[2].read_text()
    assert "<svg" in picture and picture.count("<path") > 20
    for file, reason in ((tmp_path / "plot.jpeg", r"\.png or \.svg"), (tmp_path / "no" / "plot.png", "no directory")):
        failed = roofline(tiny_llama, "--plot", file)
        assert (failed.returncode, failed.stdout) == (2, "")
        assert re.fullmatch(rf"octavo: [^\n]*{reason}[^\n]*\n", failed.stderr)


def test_no_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from octavo.bench.plot import check_plot
    from octavo.errors import ConfigError

    check_plot(tmp_path / "plot.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[plot\]'"):
        check_plot(tmp_path / "plot.png")


def test_backend_torch_is_refused(tiny_llama: Path) -> None:
    failed = roofline(tiny_llama, "--backend", "torch")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "leave out backend torch" in failed.stderr


def test_the_profile_counts_only_while_it_is_on(tiny_llama: Path) -> None:
    engine = load_engine(EngineConfig(model=str(tiny_llama), threads=2, max_batch_size=4), tiny_llama)
    backend = engine.backend
    assert isinstance(backend, CpuBackend)
    batch = step_batch([(list(range(3, 103)), 0, [0, 1, 2, 3])], sample=[99])
    before = backend.step(batch)
    assert backend.times() == {}
    backend.profile(True)
    assert set(backend.times().values()) == {0.0}
    started = time.perf_counter()
    profiled = backend.step(batch)
    seconds = time.perf_counter() - started
    times = backend.times()
    ops = {"rotary", "embed", "norm", "linear", "rope_and_cache", "attention", "sampled_rows", "head", "sample"}
    ops.add("pool_rows")
    assert times.keys() == ops
    assert all(times.values()) and sum(times.values()) <= seconds
    backend.profile(True)
    assert set(backend.times().values()) == {0.0}
    backend.profile(False)
    backend.step(batch)
    assert backend.times() == {}
    assert profiled.tokens == before.tokens
    engine.close()
