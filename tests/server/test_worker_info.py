"""What routers in front of several servers query and add to requests."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

import octavo
from server_process import ServerProcess, post, serving

HELLO = [{"role": "user", "content": "Say hello to the modules"}]


def get(server: ServerProcess, path: str) -> Any:
    return httpx.get(f"{server.url}{path}").raise_for_status().json()


def render(server: ServerProcess, kind: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{kind}/render", json=body)


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info(server: ServerProcess, tiny_llama: Path, path: str) -> None:
    info, limits = get(server, path), get(server, "/stats")["models"][0]["limits"]
    assert (info["model_id"], info["served_model_name"]) == ("tiny", "tiny")
    assert (info["model_path"], info["tokenizer_path"]) == (str(tiny_llama), str(tiny_llama))
    assert (info["tp_size"], info["dp_size"], info["version"]) == (1, 1, octavo.__version__)
    assert info["max_running_requests"] == limits["max_batch_size"]
    assert info["max_prefill_tokens"] == limits["max_batch_tokens"]
    assert info["context_length"] == limits["max_model_len"]
    assert info["kv_block_size"] == limits["page_size"]
    assert (
        info["max_total_num_tokens"] == get(server, "/stats")["models"][0]["engine"]["num_pages"] * limits["page_size"]
    )


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(server: ServerProcess, tiny_llama: Path, path: str) -> None:
    info = get(server, path)
    assert (info["model_path"], info["served_model_name"]) == (str(tiny_llama), "tiny")
    assert info["is_generation"] is True


def test_load(tiny_llama: Path) -> None:
    async def loads() -> list[Any]:
        async with serving(tiny_llama, max_batch_size=1) as (llm, _, (host, port)), httpx.AsyncClient() as http:
            url = f"http://{host}:{port}/get_load"
            idle = (await http.get(url)).json()
            body = {"prompt": "Endless", "max_tokens": 480, "n": 20, "ignore_eos": True}
            _, writer = await post((host, port), body)
            while (await llm.stats()).running == 0:
                pass
            busy = (await http.get(url)).json()
            writer.close()
            return [idle, busy]

    idle, [busy] = asyncio.run(loads())
    assert idle == [{"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}]
    assert busy["num_reqs"] == 1 + busy["num_waiting_reqs"] > 1
    assert 32 <= busy["num_tokens"] <= 512


def test_a_rendered_chat_is_the_prompt(server: ServerProcess, client: openai.OpenAI, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    messages = [*HELLO, {"role": "assistant", "content": "Hello"}]
    for chat, options in [(HELLO, {}), (messages, {"continue_final_message": True, "add_generation_prompt": False})]:
        reply = render(server, "chat/completions", model="tiny", messages=chat, **options).json()
        flags = {"add_generation_prompt": True, **options}
        assert reply["token_ids"] == tokenizer.apply_chat_template(chat, return_dict=False, **flags)
        assert reply["model"] == "tiny"
    usage = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).usage  # type: ignore[arg-type]
    assert usage is not None
    rendered = render(server, "chat/completions", messages=HELLO, cache_salt="s").json()
    assert (len(rendered["token_ids"]), rendered["cache_salt"]) == (usage.prompt_tokens, "s")


def test_rendered_completions(server: ServerProcess, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = ["The module", "A class " * 50]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert [each["token_ids"] for each in render(server, "completions", prompt=texts).json()] == expected
    [ids] = render(server, "completions", prompt=[7, 8]).json()
    assert ids["token_ids"] == [7, 8]


def test_what_cannot_be_rendered(server: ServerProcess) -> None:
    continued = render(server, "completions", prompt="a", kv_cache_state="kv-1")
    assert (continued.status_code, continued.json()["error"]["param"]) == (400, "kv_cache_state")
    assert render(server, "chat/completions", messages=HELLO, model="other").status_code == 404
    assert render(server, "completions", prompt="word " * 600).status_code == 400


def test_the_engine_that_a_router_chooses_changes_nothing(server: ServerProcess) -> None:
    def choices(**body: Any) -> Any:
        reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "temperature": 0, **body})
        return reply.raise_for_status().json()["choices"]

    assert choices(data_parallel_rank=1) == choices(routed_dp_rank=1) == choices()


def test_a_chat_without_a_model_through_sglang_router(client: openai.OpenAI) -> None:
    """The router then writes the model "unknown"."""
    reply = client.chat.completions.create(model="unknown", messages=HELLO, max_tokens=1)  # type: ignore[arg-type]
    assert reply.model == "tiny"
