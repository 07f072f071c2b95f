"""Logprobs in replies: the forms of OpenAI's chats and completions, and vLLM's form for prompts."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from octavo.outputs import CompletionOutput, Logprob
from octavo.text import Tokenizer

from .replies import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob, encode

PIECE = 1024  # logprobs of prompts that are converted at once on the event loop, in about a millisecond

Result = TypeVar("Result")
Entry = dict[int, Logprob] | None
"""The logprobs at one position by token; None for the first token of a prompt."""


@dataclass(frozen=True)
class LogprobFormat:
    """Formats logprobs with a model's tokens.

    Args:
        as_ids: whether tokens are shown as "token_id:123" instead of their text (return_tokens_as_token_ids).
    """

    tokenizer: Tokenizer
    as_ids: bool = False

    def chat(self, new: CompletionOutput, top: int | None) -> ChatLogprobs | None:
        """Return the logprobs of an output in a chat, with those of the `top` likeliest tokens, -1 for all."""
        if new.logprobs is None:
            return None
        content = []
        for token, entry in zip(new.token_ids, new.logprobs, strict=True):
            likeliest = sorted(entry.items(), key=lambda item: item[1].rank)
            best = [TopLogprob(*self._spelled(*item)) for item in (likeliest if top == -1 else likeliest[:top])]
            content.append(TokenLogprob(*self._spelled(token, entry[token]), best))
        return ChatLogprobs(content)

    def completion(self, tokens: Sequence[int], entries: Sequence[Entry], offset: int, top: bool) -> CompletionLogprobs:
        """Return the logprobs of tokens in a completion, the first of which starts at `offset` in the text.

        Args:
            top: whether those of the likeliest tokens are wanted too.
        """
        texts = [self.tokenizer.token_text(token) for token in tokens]
        return CompletionLogprobs(
            tokens=[self._name(token, text) for token, text in zip(tokens, texts, strict=True)],
            token_logprobs=[of[token].logprob if of else None for token, of in zip(tokens, entries, strict=True)],
            top_logprobs=[self._by_name(of) if of else None for of in entries] if top else None,
            text_offset=list(itertools.accumulate(map(len, texts[:-1]), initial=offset)) if texts else [],
        )

    async def echoed(self, prompt: list[int], known: Sequence[Entry], top: bool) -> CompletionLogprobs:
        """Return the logprobs of a prompt that is echoed in a completion, without holding the event loop for long."""

        def convert(part: slice) -> CompletionLogprobs:
            piece = self.completion(prompt[part], known[part], 0, top)
            piece.top_logprobs = [msgspec.Raw(encode(each)) for each in piece.top_logprobs or ()]
            return piece

        whole = CompletionLogprobs([], [], [] if top else None, [])
        offset = 0
        async for piece in _in_pieces(known, convert):
            whole.text_offset += [offset + each for each in piece.text_offset]
            whole.tokens += piece.tokens
            whole.token_logprobs += piece.token_logprobs
            if whole.top_logprobs is not None:
                whole.top_logprobs += piece.top_logprobs or ()
            offset = whole.text_offset[-1] + len(self.tokenizer.token_text(prompt[len(whole.tokens) - 1]))
        return whole

    def _spelled(self, token: int, entry: Logprob) -> tuple[str, float, list[int]]:
        return self._name(token, entry.decoded_token), entry.logprob, list(self.tokenizer.token_bytes(token))

    def _name(self, token: int, text: str) -> str:
        return f"token_id:{token}" if self.as_ids else text

    def _by_name(self, entries: dict[int, Logprob]) -> dict[str, float]:
        """Return logprobs by token. Of tokens with the same text, such as parts of a character, the likeliest wins."""
        ordered = sorted(entries.items(), key=lambda item: -item[1].rank)
        return {self._name(token, entry.decoded_token): entry.logprob for token, entry in ordered}


async def prompt_logprobs(known: Sequence[Entry]) -> msgspec.Raw:
    """Return a prompt's logprobs in vLLM's form, as JSON, without holding the event loop for long.

    For each token of the prompt, it has a map of token id to {"logprob", "rank", "decoded_token"}, or null.
    """
    pieces = [piece async for piece in _in_pieces(known, lambda part: encode(list(known[part]))[1:-1])]
    return msgspec.Raw(b"[%b]" % b",".join(pieces))


async def _in_pieces(known: Sequence[Entry], convert: Callable[[slice], Result]) -> AsyncGenerator[Result, None]:
    """Yield the results of `convert` for consecutive parts of `known`, each of about PIECE logprobs.

    Other tasks run between two parts. An entry with more logprobs than that is converted in another thread.
    """
    width = len(known[1] or ()) if len(known) > 1 else 1
    length = max(1, PIECE // max(width, 1))
    for begin in range(0, len(known), length):
        part = slice(begin, begin + length)
        yield convert(part) if width <= PIECE else await asyncio.to_thread(convert, part)
        await asyncio.sleep(0)
