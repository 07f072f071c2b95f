"""What octavo bench roofline measures of a GPU, as far as there is none: on the processor, and by hand."""

import dataclasses
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed; it comes with octavo[cuda]")

from command_line import complaint  # noqa: E402
from octavo.backends.cuda import roofline  # noqa: E402
from octavo.backends.cuda.kernels.four_bits import pack  # noqa: E402
from octavo.backends.cuda.kernels.rotation import Int8Rows  # noqa: E402
from octavo.backends.cuda.roofline import DeviceClock, Meter  # noqa: E402
from octavo.bench.roofline import Ceilings, print_tables  # noqa: E402
from random_model import PLAIN  # noqa: E402

CPU = torch.device("cpu")
TIED = dataclasses.replace(PLAIN, tied_embeddings=True)


def test_rates_are_those_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that gives each call two seconds."""
    monkeypatch.setattr(DeviceClock, "seconds", lambda self: 2.0)
    assert roofline.copy_rate(CPU, 4096) == 4096  # read and written
    assert roofline.matmul_rate(CPU, 32) == roofline.int8_rate(CPU, 32) == 32**3


def test_the_clock_counts_only_while_it_is_on() -> None:
    clock = DeviceClock(CPU)
    with clock.step():
        time.sleep(0.01)
    assert clock.seconds() == 0
    clock.profile(True)
    for _ in range(2):
        with clock.step():
            time.sleep(0.01)
    assert 0.02 <= clock.seconds() < 1
    clock.profile(True)
    assert clock.seconds() == 0


def test_bytes_and_integers_of_each_recipe() -> None:
    layer, vocab = torch.zeros(128, 64), torch.zeros(100, 64, dtype=torch.bfloat16)
    rows = Int8Rows(layer.to(torch.int8), torch.zeros(128, 1))
    bits = pack(layer.to(torch.uint8), torch.zeros(128, 2), torch.zeros(128, 2), False)
    for weight, size, integers in ((layer.bfloat16(), 16384, 0), (rows, 8192 + 512, 1), (bits, 4096 + 512, 0)):
        tied = Meter(TIED, {"embed": vocab, "layers.0.out": weight}, 32, 7, "G")
        assert (tied.layer_bytes, tied.head_bytes) == (size, 12800)
        assert tied.layer_integers == tied.head_integers == integers
    apart = {"embed": vocab, "embed.integers": bits, "layers.0.out": bits}
    assert Meter(TIED, apart, 32, 7, "G").head_bytes == 4096 + 512
    untied = {"embed": vocab, "head": layer.bfloat16(), "layers.0.out": bits}
    assert Meter(dataclasses.replace(PLAIN, tied_embeddings=False), untied, 32, 7, "G").head_bytes == 16384


def test_a_gpu_has_no_threads_and_one_share(capsys: pytest.CaptureFixture[str]) -> None:
    step = {
        "phase": "decode", "batch_size": 1, "context": 138, "milliseconds": 2.0, "tokens_per_second": 500.0,
        "bytes": {"weight": 1e9, "kv": 1e6}, "operations": {"linear": 1e9, "attention": 1e6, "head": 1e6},
        "floor_milliseconds": 1.5, "limited_by": "memory", "achieved": 0.75, "shares": {"device": 0.9, "host": 0.1},
    }  # fmt: skip
    print_tables(Ceilings("NVIDIA H100", 0, 3e12, 8e14, 1.6e15), [step])
    printed = capsys.readouterr().out
    assert "read and written" in printed and "Device" in printed and "90.0%" in printed
    assert "Threads" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_gpu_it_is_one_line(tiny_llama: Path) -> None:
    said = complaint("bench", "roofline", tiny_llama, "--device", "cuda")
    assert said.startswith("octavo: device cuda is not there: PyTorch finds no GPU")
