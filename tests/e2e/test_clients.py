"""Programs that use real clients, unmodified (tests/clients), against a real server.

`make clients` installs the clients that are not among the tests' own packages, into an environment of their own, so
that their requirements do not change those of Octavo.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server_process import ServerProcess
from tiny_models import save_tool_model

SCRIPTS = Path(__file__).parents[1] / "clients"
INSTALLED = Path(sys.prefix) / ".clients"
PYTHON = INSTALLED / "bin" / "python"
OWN = ("openai_python", "anthropic_python", "ollama_python")
OTHERS = ("langchain_openai_python", "litellm_python", "instructor_python", "pydantic_ai_python", "llm_python")
needs_clients = pytest.mark.skipif(not PYTHON.exists(), reason="the clients are not installed: run make clients")


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of a model that calls a tool if there is one."""
    folder = tmp_path_factory.mktemp("tools")
    with ServerProcess(save_tool_model(folder), "--data-dir", str(folder / "data")) as server:
        yield server


def run(server: ServerProcess, *command: object, **options: object) -> None:
    """Run a program to its end, after which the server must have no requests."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    [model] = httpx.get(f"{server.url}/stats").json()["models"]
    assert (model["engine"]["running"], model["engine"]["waiting"]) == (0, 0)


@pytest.mark.parametrize("script", OWN)
def test_clients_of_the_tests(tools: ServerProcess, script: str) -> None:
    run(tools, sys.executable, SCRIPTS / f"{script}.py", tools.url)


@needs_clients
@pytest.mark.parametrize("script", OTHERS)
def test_other_clients(tools: ServerProcess, script: str) -> None:
    run(tools, PYTHON, SCRIPTS / f"{script}.py", tools.url)


@needs_clients
@pytest.mark.parametrize("script", ["lm_eval_python", "guidellm_python"])
def test_clients_that_measure(server: ServerProcess, tiny_llama: Path, script: str) -> None:
    run(server, PYTHON, SCRIPTS / f"{script}.py", server.url, tiny_llama)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(
    not (INSTALLED / "node_modules").exists(), reason="node's clients are not installed: run make clients"
)
def test_clients_of_node(tools: ServerProcess) -> None:
    with (SCRIPTS / "node.mjs").open() as script:  # modules are looked up in the working directory
        environment = {"SERVER": tools.url, "PATH": "/usr/bin:/bin"}
        run(tools, shutil.which("node"), "--input-type=module", cwd=INSTALLED, stdin=script, env=environment)
