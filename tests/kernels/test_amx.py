"""The AMX kernels: on a processor that has AMX, else on an emulator, which is tested first."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parents[1] / "support"
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "fma", "avx2"}


@dataclass(frozen=True)
class Amx:
    """How to run a program with AMX instructions; `emulator` is None if the processor has them."""

    probe: Path
    emulator: Path | None

    def environment(self, **variables: str) -> dict[str, str]:
        preload = {} if self.emulator is None else {"LD_PRELOAD": str(self.emulator)}
        return {**os.environ, **preload, **variables}

    def run_probe(self, case: str, data: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run([self.probe, case], input=data, env=self.environment(), capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def amx(tmp_path_factory: pytest.TempPathFactory) -> Amx:
    if platform.machine() not in ("x86_64", "AMD64") or not set(Path("/proc/cpuinfo").read_text().split()) >= AVX512:
        pytest.skip("the AMX kernels need AVX-512 (VNNI, BF16), which this machine lacks, beside AMX or its emulator")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler to build the AMX emulator with")
    folder = tmp_path_factory.mktemp("amx")
    compile_ = [compiler, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror"]
    probe, emulator = folder / "amx_probe", folder / "amx_emulator.so"
    subprocess.run([*compile_, "-mamx-tile", HERE / "amx_probe.cpp", "-o", probe, "-pthread"], check=True)
    if subprocess.run([probe, "nothing"], capture_output=True).returncode == 0:
        return Amx(probe, None)
    flags = ["-O3", "-mavx2", "-mfma", "-ffp-contract=off", "-fPIC", "-shared"]
    subprocess.run([*compile_, *flags, HERE / "amx_emulator.cpp", "-o", emulator], check=True)
    return Amx(probe, emulator)


SHAPES = [(16, 16, 16), (1, 16, 16), (3, 5, 7), (16, 1, 2), (9, 16, 1)]


@pytest.mark.parametrize("rows, elements, columns", SHAPES)
@pytest.mark.parametrize("which, dtypes", [(1, "bb"), (2, "bB"), (3, "Bb"), (4, "BB")])
def test_products_of_bytes(amx: Amx, which: int, dtypes: str, rows: int, elements: int, columns: int) -> None:
    rng = np.random.default_rng(which)
    a = rng.integers(0, 256, (rows, elements, 4), np.uint8).view(dtypes[0])
    b = rng.integers(0, 256, (elements, columns, 4), np.uint8).view(dtypes[1])
    c = rng.integers(-(2**31), 2**31, (rows, columns), np.int64).astype(np.int32)
    header = np.array([which, rows, elements, columns], np.int32)
    probe = amx.run_probe("product", b"".join(x.tobytes() for x in (header, a, b, c)))
    exact = c + np.einsum("mki,kni->mn", a.astype(np.int64), b.astype(np.int64))
    assert probe.stdout == exact.astype(np.int32).tobytes()  # wraps


@pytest.mark.parametrize("rows, elements, columns", SHAPES)
def test_products_of_bf16(amx: Amx, rows: int, elements: int, columns: int) -> None:
    """To the bit: even and odd pairs apart, fused, one rounding for each; denormals are zeros in and out."""
    rng = np.random.default_rng(0)

    def bf16(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32).view(np.uint32) >> 16

    a, b = bf16(rows, elements, 2), bf16(elements, columns, 2)
    a[0, 0], b[0, 0] = 0x0040, 0x7000  # a denormal, times 2^97
    c = rng.normal(size=(rows, columns)).astype(np.float32)
    c[0, 0] = np.float32(1e-40)
    wide_a, wide_b = ((x << 16).view(np.float32).astype(np.float64) for x in (a, b))
    wide_a[0, 0] = 0
    sums = np.zeros((rows, columns, 2), np.float32)
    for k in range(elements):
        sums = (sums + wide_a[:, k, None] * wide_b[k]).astype(np.float32)
    exact = np.where(np.abs(c) < 1e-38, np.float32(0), c) + (sums[..., 0] + sums[..., 1])
    header = np.array([0, rows, elements, columns], np.int32)
    stored = (header, a.astype(np.uint16), b.astype(np.uint16), c)
    probe = amx.run_probe("product", b"".join(x.tobytes() for x in stored))
    np.testing.assert_array_equal(np.frombuffer(probe.stdout, np.float32).reshape(rows, columns), exact)


@pytest.mark.parametrize("case", ["addresses", "states", "nothing"])
def test_addresses_and_states(amx: Amx, case: str) -> None:
    probe = amx.run_probe(case)
    assert (probe.returncode, probe.stdout, probe.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    "case, why",
    [
        ("no permission", "ARCH_REQ_XCOMP_PERM"),
        ("palette", "palette"),
        ("reserved", "reserved"),
        ("rows", "more than 16 rows"),
        ("row bytes", "more than 64 bytes"),
        ("no rows", "not both"),
        ("ninth tile", "only 8 tiles"),
        ("unconfigured", "once per thread"),
        ("released", "once per thread"),
        ("unused tile", "not configured"),
        ("same tile", "the same"),
        ("other rows", "different rows"),
        ("other columns", "different columns"),
        ("other k", "do not fit"),
        ("not AMX", ""),
    ],
)
def test_what_a_processor_refuses_ends_the_process(amx: Amx, case: str, why: str) -> None:
    probe = amx.run_probe(case)
    assert probe.returncode < 0  # a signal
    if amx.emulator:
        assert why in probe.stderr.decode()


MODELS = ["llama", "llama-biases", "qwen3"]


@pytest.fixture(scope="module")
def logits(
    amx: Amx, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """What amx_logits.py writes, of all MODELS."""
    pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        (folder / name).symlink_to(tiny_model(name))
    command = [sys.executable, HERE / "amx_logits.py", folder / "logits.npz", *(folder / name for name in MODELS)]
    environment = amx.environment(PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    subprocess.run(command, env=environment, check=True, timeout=120)
    return dict(np.load(folder / "logits.npz"))


@pytest.mark.parametrize("recipe", ["none/bf16", "8bit/bf16", "4bit/bf16", "none/int8"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_on_amx(amx: Amx, logits: dict[str, np.ndarray], model: str, recipe: str) -> None:
    """Close to AVX-512's logits, and the same bits whatever the step's size and what is beside.

    Sums of integers are exact, and so is attention to a single position: then the logits are equal.
    """
    name = f"{model}/{recipe}"
    assert logits[f"{name}/avx512/products"] == 0
    assert logits[f"{name}/amx/products"] > 0 or amx.emulator is None
    for isa in ("amx", "avx512"):
        whole = logits[f"{name}/{isa}/chunk_70"]
        np.testing.assert_array_equal(logits[f"{name}/{isa}/chunk_17"], whole)
        np.testing.assert_array_equal(logits[f"{name}/{isa}/one_by_one"], whole[-4:])
        start = 0
        for length in logits["lengths"]:
            np.testing.assert_array_equal(logits[f"{name}/{isa}/several"][start : start + length], whole[:length])
            start += length
    amx_logits, reference = logits[f"{name}/amx/chunk_70"], logits[f"{name}/avx512/chunk_70"]
    limit = 5e-3 if recipe.startswith("none") else 1e-2  # a last bit may round an activation to the next integer
    assert np.linalg.norm(amx_logits - reference) < limit * np.linalg.norm(reference)
    if not recipe.startswith("none"):
        np.testing.assert_array_equal(logits[f"{name}/amx/first"], logits[f"{name}/avx512/first"])


@pytest.mark.parametrize("kv_cache_dtype", ["bf16", "int8"])
def test_a_long_context_on_amx(logits: dict[str, np.ndarray], kv_cache_dtype: str) -> None:
    name = f"llama/none/{kv_cache_dtype}"
    for isa in ("amx", "avx512"):
        np.testing.assert_array_equal(logits[f"{name}/{isa}/long_one_by_one"], logits[f"{name}/{isa}/long"])
    amx_logits, reference = logits[f"{name}/amx/long"], logits[f"{name}/avx512/long"]
    assert np.linalg.norm(amx_logits - reference) < 5e-3 * np.linalg.norm(reference)
