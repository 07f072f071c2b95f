"""POST /tokenize and /detokenize against transformers."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from server_process import ServerProcess

HELLO = [{"role": "user", "content": "Say hello to the modules"}]


def ask(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body)


def test_a_prompt(server: ServerProcess, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for options in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
        reply = ask(server, "/tokenize", model="tiny", prompt="The módule 漢字", **options).json()
        assert reply["tokens"] == tokenizer("The módule 漢字", **options)["input_ids"]
        assert (reply["count"], reply["token_strs"]) == (len(reply["tokens"]), None)
    assert reply["max_model_len"] == 512
    strings = ask(server, "/tokenize", prompt="two words", return_token_strs=True).json()
    assert "".join(strings["token_strs"]).endswith("two words")


def test_a_chat(server: ServerProcess, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    reply = ask(server, "/tokenize", messages=HELLO).json()
    assert reply["tokens"] == tokenizer.apply_chat_template(HELLO, return_dict=False, add_generation_prompt=True)
    shorter = ask(server, "/tokenize", messages=HELLO, add_generation_prompt=False).json()
    assert shorter["tokens"] == tokenizer.apply_chat_template(HELLO, return_dict=False)


def test_the_text_of_tokens(server: ServerProcess) -> None:
    tokens = ask(server, "/tokenize", prompt="The módule 漢字", add_special_tokens=False).json()["tokens"]
    assert ask(server, "/detokenize", tokens=tokens, model="tiny").json() == {"prompt": "The módule 漢字"}
    assert ask(server, "/detokenize", tokens=[]).json() == {"prompt": ""}


@pytest.mark.parametrize(
    "path, body, status",
    [
        ("/tokenize", {"prompt": ["one", "two"]}, 400),
        ("/tokenize", {"prompt": [1, 2]}, 400),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, 400),
        ("/tokenize", {"prompt": "word " * 600}, 400),
        ("/tokenize", {"model": "other", "prompt": "a"}, 404),
        ("/tokenize", {}, 400),
        ("/detokenize", {"tokens": "text"}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [10**9]}, 400),
        ("/detokenize", {"tokens": [1], "unknown": True}, 400),
        ("/detokenize", {"model": "other", "tokens": [1]}, 404),
    ],
)
def test_what_is_refused(server: ServerProcess, path: str, body: dict[str, Any], status: int) -> None:
    reply = ask(server, path, **body)
    assert (reply.status_code, "error" in reply.json()) == (status, True)
