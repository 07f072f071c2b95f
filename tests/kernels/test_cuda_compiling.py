"""Kernels of first steps are compiled by several threads, for an H100 without one, and found again on disk."""

import ast
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", reason="Triton is not installed; it comes with octavo[cuda]")

from triton_interpreter import INTERPRETED  # noqa: E402

if INTERPRETED:
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from octavo.backends.cuda import compiling  # noqa: E402
from octavo.backends.cuda.kernels import embed, norm  # noqa: E402

CPU = torch.device("cpu")
KERNELS = (embed.embed_kernel, norm.norm_kernel)


class Hopper:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A GPU to compile for, and an empty folder for what is compiled."""
    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """Make this process compile again."""
    for kernel in KERNELS:
        kernel.device_caches.clear()


def steps() -> list[Callable[[], None]]:
    tokens, weight = torch.zeros(3, dtype=torch.int32), torch.zeros((9, 64), dtype=torch.bfloat16)
    hidden, normed = torch.zeros((3, 64)), torch.full((3, 64), 7, dtype=torch.bfloat16)
    first = lambda: embed.embed(tokens, tokens, weight, hidden)  # noqa: E731
    second = lambda: norm.norm(hidden, weight[0], 1e-5, normed)  # noqa: E731
    return [first, second, first]


def cubins(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*.cubin")}


def test_steps_are_compiled_once_and_kept(hopper: Path) -> None:
    ready: list[int] = []
    compiling.compile_kernels(steps(), CPU, lambda: ready.append(1))
    assert len(ready) == 2
    kept = cubins(hopper)
    assert len(kept) == 2
    forget()
    compiling.compile_kernels(steps(), CPU, lambda: None)
    assert cubins(hopper) == kept


def test_only_the_thread_that_notes_launches_nothing(hopper: Path) -> None:
    """Another model of the process may run steps meanwhile."""
    others: list[str] = []
    before = triton.knobs.runtime.jit_cache_hook

    def elsewhere() -> None:
        try:
            steps()[0]()
        except Exception as error:  # it is launched, and there is no GPU
            others.append(type(error).__name__)

    with compiling.noted() as found:
        steps()[1]()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert [function for function, _ in found] == [norm.norm_kernel]
    assert len(others) == 1
    assert triton.knobs.runtime.jit_cache_hook is before


def test_a_kernel_that_does_not_compile_is_an_error(hopper: Path) -> None:
    with compiling.noted() as found:
        steps()[1]()
    broken = {key: text.replace('"*fp32"', '"*fp17"') for key, text in found.items()}
    for _ in range(2):
        with pytest.raises(Exception, match="fp17"):
            compiling.compile_noted(broken, CPU, lambda: None)
    compiling.compile_noted(found, CPU, lambda: None)


def test_sources_are_parsed_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11 fails, seldom, if two threads build syntax trees at once."""
    busy, most, parse = 0, 0, ast.parse

    def counted(source: str) -> ast.AST:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        time.sleep(0.05)  # the other threads come meanwhile
        busy -= 1
        return parse(source)

    with monkeypatch.context() as patched:
        patched.setattr(ast, "parse", counted)
        threads = [threading.Thread(target=kernel.parse) for kernel in KERNELS * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1
