"""Tokenize for event loops: short texts at once, long ones in threads, which release the GIL while they tokenize."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from .tokenizer import Tokenizer

INLINE_LENGTH = 4096  # characters, which are tokenized in about a millisecond, or token ids

Result = TypeVar("Result")


async def off_loop(tokenizer: Tokenizer, length: int, work: Callable[[], Result]) -> Result:
    """Return what `work` returns, without blocking the event loop for long.

    Args:
        tokenizer: its threads run `work` if `length` is more than INLINE_LENGTH.
        length: characters and token ids that `work` goes through.
    """
    if length <= INLINE_LENGTH:
        return work()
    return await asyncio.get_running_loop().run_in_executor(tokenizer.threads, work)
