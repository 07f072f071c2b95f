"""Logprobs in replies: the forms of OpenAI's chats and completions, and vLLM's form for prompts."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from octavo.outputs import CompletionOutput, Logprob
from octavo.text import Tokenizer

from .replies import ChatLogprobs, CompletionLogprobs, Elements, TokenLogprob, TopLogprob, encode

PIECE = 512  # logprobs of prompts that are converted at once on the event loop, in about a millisecond

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

    async def echoed(self, prompt: list[int], known: Sequence[Entry], top: bool) -> "EchoedLogprobs":
        """Convert the logprobs of a prompt that is echoed in a completion, without holding the event loop for long."""
        whole, likeliest, offset = CompletionLogprobs([], [], None, []), Elements([]), 0

        def convert(part: slice) -> tuple[CompletionLogprobs, bytes]:
            piece = self.completion(prompt[part], known[part], 0, top)
            return piece, encode(piece.top_logprobs or [])[1:-1]

        async for piece, encoded in _in_pieces(known, convert):
            likeliest.pieces.append(b"," + encoded if likeliest.pieces else encoded)
            whole.text_offset += [offset + each for each in piece.text_offset]
            whole.tokens += piece.tokens
            whole.token_logprobs += piece.token_logprobs
            offset = whole.text_offset[-1] + len(self.tokenizer.token_text(prompt[len(whole.tokens) - 1]))
        return EchoedLogprobs(whole, likeliest if top else None, offset)

    def _spelled(self, token: int, entry: Logprob) -> tuple[str, float, list[int]]:
        return self._name(token, entry.decoded_token), entry.logprob, list(self.tokenizer.token_bytes(token))

    def _name(self, token: int, text: str) -> str:
        return f"token_id:{token}" if self.as_ids else text

    def _by_name(self, entries: dict[int, Logprob]) -> dict[str, float]:
        """Return logprobs by token. Of tokens with the same text, such as parts of a character, the likeliest wins."""
        ordered = sorted(entries.items(), key=lambda item: -item[1].rank)
        return {self._name(token, entry.decoded_token): entry.logprob for token, entry in ordered}


@dataclass(frozen=True)
class EchoedLogprobs:
    """The logprobs of an echoed prompt.

    Attributes:
        logprobs: without those of the likeliest tokens.
        likeliest: the elements of top_logprobs; None if they are not wanted.
        length: the length of the prompt's text, where the completion begins.
    """

    logprobs: CompletionLogprobs
    likeliest: Elements | None
    length: int

    def followed_by(self, new: CompletionLogprobs, likeliest: list[msgspec.Raw]) -> CompletionLogprobs:
        """Return the logprobs of the prompt and of the completion after it.

        Args:
            likeliest: what to put in place of `self.likeliest`.
        """
        before = self.logprobs
        return CompletionLogprobs(
            tokens=before.tokens + new.tokens,
            token_logprobs=before.token_logprobs + new.token_logprobs,
            top_logprobs=None if self.likeliest is None else [*likeliest, *(new.top_logprobs or ())],
            text_offset=before.text_offset + new.text_offset,
        )


async def prompt_logprobs(known: Sequence[Entry]) -> Elements:
    """Convert a prompt's logprobs to vLLM's form, without holding the event loop for long.

    For each token of the prompt, there is a map of token id to {"logprob", "rank", "decoded_token"}, or null.
    """
    elements = Elements([])
    async for encoded in _in_pieces(known, lambda part: encode(list(known[part]))[1:-1]):
        elements.pieces.append(b"," + encoded if elements.pieces else encoded)
    return elements


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
