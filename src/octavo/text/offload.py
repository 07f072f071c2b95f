"""Tokenize for event loops: short texts at once, long ones in threads, which release the GIL while they tokenize."""

import asyncio
from collections.abc import Sequence

from .tokenizer import Tokenizer

INLINE_CHARACTERS = 4096  # tokenized in about a millisecond


async def encode_off_loop(
    tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool = True, max_tokens: int | None = None
) -> list[list[int]]:
    """Return the token ids of each text, as `Tokenizer.encode` does, without blocking the event loop.

    Raises:
        InvalidRequest: A text is not Unicode.
        PromptTooLong: A text has more than `max_tokens` tokens.
    """

    def encode() -> list[list[int]]:
        return [tokenizer.encode(text, add_special_tokens, max_tokens) for text in texts]

    if sum(map(len, texts)) <= INLINE_CHARACTERS:
        return encode()
    return await asyncio.get_running_loop().run_in_executor(tokenizer.threads, encode)
