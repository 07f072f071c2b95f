"""Fixtures that several test files share: models, made or found once a session; and the tiny one, served."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import openai
import pytest

from octavo import LLM
from server_process import ServerProcess

# A shell starts background jobs, as CI may be one, with Ctrl-C ignored, and nohup with SIGHUP ignored. Children inherit
# that, and tests send both signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--many", action="store_true", help="more prompts and more text in the tests that take minutes")


@pytest.fixture(scope="session")
def many(request: pytest.FixtureRequest) -> bool:
    """Whether to test with the full amount of prompts and text, or with a sample of it."""
    return bool(request.config.getoption("--many"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name in tiny_models.CONFIGS -> directory of that model."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        from tiny_models import save_tiny_model

        if name not in made:
            made[name] = save_tiny_model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return directory


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[[str], Path]) -> Path:
    """Directory of a tiny random Llama with a tokenizer of 512 tokens, a chat template and a context of 512."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The .gguf file of SmolLM2-135M-Instruct."""
    from octavo.weights import resolve

    return resolve("smollm2")


@pytest.fixture(scope="session")
def smollm2_in_transformers(smollm2: Path) -> "PreTrainedModel":
    """SmolLM2 in float32, from the same .gguf file by transformers' own loader."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama)) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tiny_llama) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
