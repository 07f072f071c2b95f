"""A disk tier below a whole engine: restarts, damage and other models; the tokens are always the same."""

import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo import LLM, SamplingParams
from server_process import ServerProcess

PROMPTS = [[(7 * i + k) % 500 + 3 for i in range(200)] for k in range(3)]
FULL_PAGES = 200 // 32 * 32  # tokens of each prompt that lie in full pages


def generate(model: Path, folder: Path | None, **settings: Any) -> tuple[list[list[int]], list[int]]:
    """The tokens of each prompt, and how many of its prompt were not computed, by an engine of its own."""
    disk = {} if folder is None else {"kv_disk": str(folder)}
    with LLM(str(model), max_model_len=256, kv_cache_memory="8MiB", **disk, **settings) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.8, seed=5, max_tokens=20, ignore_eos=True))
    return [output.outputs[0].token_ids for output in outputs], [output.metrics.cached_tokens for output in outputs]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[list[int]]:
    return generate(tiny_llama, None)[0]


def test_prompts_are_found_after_a_restart(tiny_llama: Path, expected: list[list[int]], tmp_path: Path) -> None:
    assert generate(tiny_llama, tmp_path) == (expected, [0, 0, 0])
    assert generate(tiny_llama, tmp_path) == (expected, [FULL_PAGES] * 3)


def test_what_is_damaged_is_computed_again(tiny_llama: Path, expected: list[list[int]], tmp_path: Path) -> None:
    generate(tiny_llama, tmp_path)
    for i, file in enumerate(sorted(tmp_path.rglob("*.page"))):
        content = bytearray(file.read_bytes())
        content[i * 997 % len(content)] ^= 16
        file.write_bytes(content[: len(content) - i % 2])
    tokens, cached = generate(tiny_llama, tmp_path)
    assert tokens == expected
    assert all(n < FULL_PAGES for n in cached)
    assert generate(tiny_llama, tmp_path) == (expected, [FULL_PAGES] * 3), "and is there again afterwards"


def test_pages_of_another_recipe_are_not_found(tiny_llama: Path, tmp_path: Path) -> None:
    generate(tiny_llama, tmp_path)
    for settings in ({"quantization": "8bit"}, {"kv_cache_page_size": 64}, {"kv_cache_dtype": "int8"}):
        tokens = generate(tiny_llama, None, **settings)[0]
        assert generate(tiny_llama, tmp_path, **settings) == (tokens, [0, 0, 0])


def test_host_memory_below_a_device(tiny_llama: Path) -> None:
    """PyTorch's pool has room for one of the prompts, host memory for all."""
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    torch = {"backend": "torch", "dtype": "float32", "max_model_len": 256}
    with LLM(str(tiny_llama), kv_cache_memory="16MiB", **torch) as llm:
        page_bytes = 2**24 // llm.stats().num_pages
    with LLM(str(tiny_llama), kv_cache_memory=8 * page_bytes, kv_host_memory="64MiB", **torch) as llm:
        first, second = ([llm.generate(prompt, greedy)[0] for prompt in PROMPTS] for _ in range(2))
        stats = llm.stats()
    assert [output.outputs[0].token_ids for output in second] == [output.outputs[0].token_ids for output in first]
    assert [output.metrics.cached_tokens for output in second] == [FULL_PAGES] * 3
    assert stats.num_pages == 8 and stats.pages_fetched >= FULL_PAGES // 32 * 3


def test_a_folder_that_is_removed_while_running(
    tiny_llama: Path, expected: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pages"
    with LLM(str(tiny_llama), max_model_len=256, kv_cache_memory="8MiB", kv_disk=str(folder)) as llm:
        shutil.rmtree(folder)
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.8, seed=5, max_tokens=20, ignore_eos=True))
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def ask(server: ServerProcess, prompt: list[int]) -> tuple[str, int]:
    """The text, and how many tokens of the prompt were not computed."""
    body = {"prompt": prompt, "temperature": 0.8, "seed": 5, "max_tokens": 20, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_server_is_killed_while_it_works_and_then_stopped(tiny_llama: Path, tmp_path: Path) -> None:
    flags = ("--kv-disk", str(tmp_path), "--max-model-len", "256")
    with ServerProcess(tiny_llama) as server:
        expected = [ask(server, prompt)[0] for prompt in PROMPTS]
    killed = ServerProcess(tiny_llama, *flags).__enter__()
    engine = killed.engine_pid()
    body = {"prompt": PROMPTS, "max_tokens": 50, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{killed.url}/v1/completions", json=body, timeout=60) as events:
        next(events.iter_lines())
        killed.signal(signal.SIGKILL)
        os.kill(engine, signal.SIGKILL)
        killed.process.wait(timeout=30)
    with ServerProcess(tiny_llama, *flags) as server:
        assert [ask(server, prompt)[0] for prompt in PROMPTS] == expected
    with ServerProcess(tiny_llama, *flags) as server:
        assert [ask(server, prompt) for prompt in PROMPTS] == [(text, FULL_PAGES) for text in expected]
