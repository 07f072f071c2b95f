"""Logprobs of prompts in replies: the JSON of all entries, made in pieces between which other tasks run."""

import asyncio
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from octavo.engine.messages import TokenLogprobs
from octavo.frontend.logprobs import LogprobRows, PromptLogprobs
from octavo.server.openai.logprobs import PIECE, LogprobFormat, prompt_logprobs
from octavo.server.openai.replies import CompletionLogprobs, Elements, encode
from octavo.text import Tokenizer

Result = TypeVar("Result")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.load(tiny_llama)


def scored(tokenizer: Tokenizer, length: int, width: int) -> tuple[list[int], PromptLogprobs]:
    """A prompt of random tokens with random logprobs."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, length).tolist()
    top = np.array([rng.choice(max(512, width), width, replace=False) for _ in tokens[1:]], np.int32)
    given = TokenLogprobs(
        rng.normal(size=length - 1).astype(np.float32).tobytes(),
        rng.integers(1, 512, length - 1).astype(np.int32).tobytes(),
        top.tobytes(),
        rng.normal(size=top.shape).astype(np.float32).tobytes(),
    )
    return tokens, PromptLogprobs(tokens, LogprobRows(given, tokenizer.token_text))


def decoded(elements: Elements) -> Any:
    return json.loads(b"[%b]" % b"".join(elements.pieces))


def counted(work: Coroutine[Any, Any, Result]) -> tuple[Result, int]:
    """Return the result of `work`, and how often another task ran meanwhile."""

    async def main() -> tuple[Result, int]:
        task, turns = asyncio.ensure_future(work), 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        return task.result(), turns

    return asyncio.run(main())


@pytest.mark.parametrize("length, width", [(1, 0), (2, 3), (1000, 20), (4, 5000)])
def test_the_form_of_vllm(tokenizer: Tokenizer, length: int, width: int) -> None:
    _, known = scored(tokenizer, length, width)
    elements, turns = counted(prompt_logprobs(known))
    expected = [
        {
            str(token): {"logprob": each.logprob, "rank": each.rank, "decoded_token": each.decoded_token}
            for token, each in entry.items()
        }
        if entry
        else None
        for entry in known
    ]
    assert decoded(elements) == expected
    assert turns >= length // max(1, PIECE // max(width, 1))


@pytest.mark.parametrize("top", [True, False])
def test_an_echoed_prompt(tokenizer: Tokenizer, top: bool) -> None:
    tokens, known = scored(tokenizer, 1000, 20)
    form = LogprobFormat(tokenizer)
    echoed, turns = counted(form.echoed(tokens, known, top))
    expected = form.completion(tokens, known, 0, top)
    assert echoed.length == expected.text_offset[-1] + len(tokenizer.token_text(tokens[-1]))
    assert (decoded(echoed.likeliest) if echoed.likeliest else None) == json.loads(encode(expected.top_logprobs))
    nothing, likeliest = CompletionLogprobs([], [], [] if top else None, []), expected.top_logprobs or []
    assert echoed.followed_by(nothing, likeliest) == expected  # type: ignore[arg-type]
    assert turns >= 1000 * 20 // PIECE
