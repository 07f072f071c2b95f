"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

from octavo import LLM, SamplingParams
from server_process import ServerProcess

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


def test_quick_start() -> None:
    assert len(run("quick_start.py").split()) > 5


def test_micro_batching() -> None:
    assert len(run("micro_batching.py", "2").split()) > 5


def test_temperatures() -> None:
    with LLM("smollm2") as llm:
        params = SamplingParams(temperature=0, max_tokens=150)
        [greedy] = llm.generate("What is the capital of France?", params, use_tqdm=False)
    printed = run("temperatures.py")
    assert printed.endswith(greedy.text.strip()) and len(printed) > 2 * len(greedy.text)


def test_openai_client() -> None:
    with ServerProcess("smollm2") as server:
        printed = run("openai_client.py", f"{server.url}/v1")
    assert "Paris" in printed.splitlines()[0]
    assert len(printed.splitlines()) > 1
