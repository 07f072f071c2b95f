"""The answer to GET /stats, which `octavo top` shows."""

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import msgspec

from octavo.engine.messages import EngineStats
from octavo.errors import EngineDead
from octavo.frontend.stats import FrontendStats, ReplicaStats, total
from octavo.version import __version__

if TYPE_CHECKING:  # `octavo top` imports this file for the structs alone
    from octavo.fleet.fleet import Fleet
    from octavo.fleet.model import Model


class Limits(msgspec.Struct, kw_only=True):
    """Settings that bound the statistics of a model's replicas together.

    Units: max_batch_size in sequences, max_queue in completions, the others in tokens.
    """

    max_batch_size: int
    max_batch_tokens: int
    max_queue: int
    max_model_len: int
    page_size: int


class ModelStats(msgspec.Struct, kw_only=True):
    """One model.

    Attributes:
        state: unloaded, loading, loaded, draining or failed.
        error: why the latest load failed; "" after a successful one.
        memory: bytes that its engines may take, if there is a memory budget; otherwise 0.
        limits, frontend: None if the model has never been loaded.
        engine: the sum over all engines that report; None if there are none.
        replicas: one entry for each engine.
    """

    name: str
    state: str
    error: str
    aliases: list[str]
    policy: str
    memory: int
    limits: Limits | None = None
    frontend: FrontendStats | None = None
    engine: EngineStats | None = None
    replicas: list[ReplicaStats] = []


class ServerStats(msgspec.Struct, kw_only=True):
    """A snapshot of the server and its engines, at `time` (Unix time, in seconds).

    Counters never decrease while an engine lives. To get a rate, divide the difference between two snapshots' counters
    by the difference between their times.
    """

    time: float
    version: str
    models: list[ModelStats]


async def server_stats(fleet: "Fleet") -> ServerStats:
    """Return a snapshot."""
    models = await asyncio.gather(*map(model_stats, fleet.all_models()))
    return ServerStats(time=time.time(), version=__version__, models=models)


async def model_stats(model: "Model") -> ModelStats:
    """Return a snapshot of one model."""
    config = model.config
    stats = ModelStats(
        name=model.name,
        state=model.state,
        error=model.error,
        aliases=list(model.spec.handling.aliases),
        policy=config.scheduling_policy,
        memory=model.size,
    )
    if model.was_loaded:
        llm = model.llm
        stats.limits = Limits(
            max_batch_size=config.max_batch_size * config.data_parallel_size,
            max_batch_tokens=config.max_batch_tokens * config.data_parallel_size,
            max_queue=config.max_queue,
            max_model_len=llm.info.max_model_len,
            page_size=llm.info.page_size,
        )
        with contextlib.suppress(EngineDead):  # a model that was swapped out has just ended
            stats.frontend, stats.replicas = llm.frontend_stats(), await llm.replica_stats()
        engines = [replica.engine for replica in stats.replicas if replica.engine is not None]
        stats.engine = total(engines) if engines else None
    return stats
