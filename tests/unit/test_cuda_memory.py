"""What is left of a GPU's memory for the KV pool, and what an engine says if nothing is."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed; it comes with octavo[cuda]")

from octavo.backends.base import Footprint  # noqa: E402
from octavo.backends.cuda import memory  # noqa: E402
from octavo.backends.cuda.memory import OUTSIDE, DeviceMemory, kv_bytes, measure_steps  # noqa: E402
from octavo.config import EngineConfig  # noqa: E402
from octavo.engine import loading  # noqa: E402
from octavo.errors import OutOfMemory  # noqa: E402

GIB = 2**30
OF_8B = Footprint("Triton", 15 * GIB, 2**22, 3 * GIB)


def left(free: float, utilization: float = 0.9, engines: int = 1, loaded: bool = True) -> float:
    return kv_bytes(DeviceMemory(80 * GIB, int(free * GIB)), utilization, engines, OF_8B, 512, loaded) / GIB


def test_the_pool_has_what_weights_and_steps_leave_of_the_share() -> None:
    assert left(64) == 72 - 18
    assert left(64, utilization=1.0) == 64 - 3  # what is free, without what steps still take
    assert left(30) == 30 - 3  # others use the GPU too
    assert left(79, loaded=False) == 72 - 18
    assert left(79, engines=2, loaded=False) == left(64, engines=2) == 36 - 18
    assert left(40, loaded=False) == 40 - 18


def test_nothing_left_is_one_line_that_says_what_would_fit() -> None:
    with pytest.raises(OutOfMemory, match=r"20% of the GPU's 80.0 GiB: weights need 15.0 GiB .* at least 0.23, or use"):
        left(64, utilization=0.2)
    assert left(64, utilization=0.23) > 0
    with pytest.raises(OutOfMemory, match=r"in each of 8 engines; use a smaller model") as refused:
        left(79, engines=8, loaded=False)
    assert "gpu_memory_utilization" not in str(refused.value)
    with pytest.raises(OutOfMemory, match=r"2.0 GiB of the GPU's 80.0 GiB are free; end other programs on it") as full:
        left(2)
    assert "\n" not in f"{refused.value}{full.value}"


def test_steps_are_measured_one_group_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs have a pool of their own, so both are added; in each, memory is used again."""
    reserved = [10]

    def takes(amount: int) -> Callable[[], object]:
        def run() -> None:
            reserved[0] = max(reserved[0], 10 + amount)

        return run

    fakes: dict[str, Any] = {
        "memory_reserved": lambda device: reserved[0],
        "empty_cache": lambda: reserved.__setitem__(0, 10),
        "synchronize": lambda device: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(memory.torch.cuda, name, fake)
    eager, graphs = [takes(5), takes(300)], [takes(70), takes(20)]
    assert measure_steps(eager, graphs, torch.device("cuda")) == OUTSIDE + 300 + 70
    assert reserved == [10]


def test_an_engine_asks_for_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: Any = SimpleNamespace(memory=DeviceMemory(80 * GIB, 64 * GIB))
    config = EngineConfig(device="cuda", gpu_memory_utilization=0.5)
    most, words = loading._kv_share(config, 1, OF_8B, loaded)
    assert most == 22 * GIB and words.endswith("gpu_memory_utilization, 50%")
    monkeypatch.setattr(memory, "memory_of_setting", lambda name: loaded.memory)
    assert loading._kv_share(config, 1, OF_8B)[0] == 22 * GIB
    given = EngineConfig(device="cuda", gpu_memory_utilization=0.01, kv_cache_memory="1GiB")
    assert loading._kv_share(given, 1, OF_8B, loaded)[0] > 0
