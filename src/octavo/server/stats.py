"""The answer to GET /stats, which `octavo top` shows."""

import time
from typing import TYPE_CHECKING

import msgspec

from octavo.engine.messages import EngineStats
from octavo.frontend.stats import FrontendStats
from octavo.version import __version__

if TYPE_CHECKING:  # `octavo top` imports this file for the structs alone
    from octavo.async_llm import AsyncLLM


class Limits(msgspec.Struct, kw_only=True):
    """Settings that bound the statistics.

    Units: max_batch_size in sequences, max_queue in completions, the others in tokens.
    """

    max_batch_size: int
    max_batch_tokens: int
    max_queue: int
    max_model_len: int
    page_size: int


class ServerStats(msgspec.Struct, kw_only=True):
    """A snapshot of the server and its engine, at `time` (Unix time, in seconds).

    Counters never decrease. To get a rate, divide the difference between two snapshots' counters by the difference
    between their times.
    """

    time: float
    version: str
    model: str
    policy: str
    limits: Limits
    frontend: FrontendStats
    engine: EngineStats


async def server_stats(llm: "AsyncLLM") -> ServerStats:
    """Return a snapshot. Raises EngineDead."""
    config = llm.config
    engine = await llm.stats()
    return ServerStats(
        time=time.time(),
        version=__version__,
        model=config.model_name,
        policy=config.scheduling_policy,
        limits=Limits(
            max_batch_size=config.max_batch_size,
            max_batch_tokens=config.max_batch_tokens,
            max_queue=config.max_queue,
            max_model_len=llm.info.max_model_len,
            page_size=llm.info.page_size,
        ),
        frontend=llm.frontend_stats(),
        engine=engine,
    )
