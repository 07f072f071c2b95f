"""Statistics of a frontend and of its replicas."""

from collections.abc import Sequence
from typing import Any

import msgspec

from octavo.engine.messages import EngineStats
from octavo.kv.tiers.counts import total_counts

MAX_TENANTS = 20


class FrontendStats(msgspec.Struct, frozen=True):
    """Statistics of the frontend.

    Attributes:
        live: Completions that run or wait.
        limit: Maximum of `live`; 0 for no limit.
        refused: Requests refused since the start because the queue was full.
        timed_out: Requests that have timed out since the start.
        tenants: Those of `live` by tenant; of the MAX_TENANTS that have most.
    """

    live: int
    limit: int
    refused: int
    timed_out: int
    tenants: dict[str, int] = {}


class ReplicaStats(msgspec.Struct, frozen=True):
    """Statistics of one replica.

    Attributes:
        name: "the engine", or "engine 0", "engine 1" and so on if a model has several replicas.
        pid: process of the engine; None if it is a thread of the frontend's process, or has ended.
        is_ready: whether the engine serves requests.
        status: text such as "the engine is ready".
        completions: unfinished completions that it was sent.
        queued_tokens: tokens to compute for those of them that have no token yet.
        role: prefill, decode or both.
        engine: its engine's statistics; None if it did not answer in time.
    """

    name: str
    pid: int | None
    is_ready: bool
    status: str
    completions: int
    queued_tokens: int
    engine: EngineStats | None
    role: str = "both"


def total(engines: Sequence[EngineStats]) -> EngineStats:
    """Return the sums of all statistics, and the page maps one after the other."""
    if len(engines) == 1:
        return engines[0]
    return EngineStats(*(_sum(values) for values in zip(*map(msgspec.structs.astuple, engines), strict=True)))


def _sum(values: Sequence[Any]) -> Any:
    if isinstance(values[0], str):
        return "".join(values)
    if isinstance(values[0], dict):
        return total_counts(values)
    if isinstance(values[0], list):
        return list(map(sum, zip(*values, strict=True)))
    return sum(values)
