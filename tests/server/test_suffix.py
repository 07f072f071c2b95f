"""`suffix` of /v1/completions on a model whose tokenizer has tokens to fill in the middle."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from server_process import ServerProcess
from tiny_models import save_tokenizer

PROMPT = "<|fim_prefix|>def add(a, b):\n    return <|fim_suffix|>\n\nadd(1, 2)<|fim_middle|>"
PREFIX, SUFFIX = "def add(a, b):\n    return ", "\n\nadd(1, 2)"


@pytest.fixture(scope="module")
def coder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    folder = tmp_path_factory.mktemp("coder")
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    save_tokenizer(folder, "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>")
    with ServerProcess(folder) as server:
        yield server, folder


def test_the_middle_is_that_of_the_authors_format(coder: tuple[ServerProcess, Path]) -> None:
    server, folder = coder
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    body = {"model": "tiny", "prompt": PREFIX, "suffix": SUFFIX}
    rendered = httpx.post(f"{server.url}/v1/completions/render", json=body).json()
    assert rendered[0]["token_ids"] == ids
    pad = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|fim_pad|>")
    options = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    middle = client.completions.create(prompt=PREFIX, suffix=SUFFIX, **options)  # type: ignore[call-overload]
    plain = client.completions.create(prompt=ids, **options)  # type: ignore[call-overload]
    assert middle.choices[0].text == plain.choices[0].text
    assert middle.usage.prompt_tokens == len(ids)
    ended = client.completions.create(  # type: ignore[call-overload]
        prompt=PREFIX, suffix=SUFFIX, logit_bias={str(pad): 100}, **options
    )
    assert (ended.choices[0].finish_reason, ended.choices[0].text) == ("stop", "")
    for wrong in ({"prompt": [1, 2]}, {"prompt": PREFIX, "kv_cache_state": True}):
        reply = httpx.post(f"{server.url}/v1/completions", json={**body, **wrong})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "suffix")
