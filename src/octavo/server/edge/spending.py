"""Count the tokens that a request takes towards the limits of its key."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from octavo.async_llm import AsyncLLM
from octavo.frontend.tally import Tally

from .access_log import RequestRecord

LEAST_TIMEOUT = 0.001  # seconds


@contextlib.asynccontextmanager
async def spending(
    record: RequestRecord, llm: AsyncLLM, terms: dict[str, Any], prompt: int, generated: int = 0
) -> AsyncGenerator[Tally | None]:
    """Reserve tokens for a block, and yield the Tally of what it takes; None if the request has no key.

    The rest is given back at the end. Under `rate_limit_mode: queue`, wait until the key's rate allows the tokens.

    Args:
        terms: the given fields of ServiceTerms, whose timeout is reduced by the wait.
        prompt: tokens of the prompts.
        generated: tokens that are generated at most.

    Raises ApiError 429.
    """
    if record.use is None:
        yield None
        return
    loop = asyncio.get_running_loop()
    began, timeout = loop.time(), terms.get("timeout") or llm.config.request_timeout
    async with record.use.spending(prompt, max(0, generated), timeout) as tally:
        if timeout and (waited := loop.time() - began) > LEAST_TIMEOUT:
            terms["timeout"] = max(timeout - waited, LEAST_TIMEOUT)
        yield tally
