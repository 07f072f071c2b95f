"""Engine: one engine of a model, as a replica of a Ray Serve deployment. It may be divided over several nodes."""

import asyncio
import logging
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray.util

from octavo.address import Address
from octavo.config import EngineConfig
from octavo.curve import Curve
from octavo.network.run import serve_engine

from .autoscaling import QUEUED_SECONDS, QUEUED_TOKENS, REQUESTS
from .cluster_secret import secret_source
from .node import start_nodes

FRESH = 30.0  # seconds for which a frontend's latest report counts: while it is too busy to send one, so are engines

log = logging.getLogger("octavo")


@dataclass(frozen=True)
class Work:
    """What one frontend has for one engine.

    Attributes:
        queued_tokens: tokens of prompts that wait, and `queued_seconds` is the time that they will take.
        requests: unfinished completions.
    """

    queued_tokens: int = 0
    queued_seconds: float = 0.0
    requests: int = 0


class Engine:
    """Serves frontends over the network while Ray keeps this replica. The engine itself is a process of its own.

    When Ray ends the replica, frontends move its requests to other engines first. If the node is lost, they notice it
    themselves.

    Args:
        settings: of the EngineConfig.
    """

    async def __init__(self, settings: Mapping[str, Any]):  # type: ignore[misc]  # Ray Serve awaits it
        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        config = EngineConfig.from_keywords(**settings, secret_file=secret_source())
        if config.nnodes > 1:
            config = replace(config, master_addr=host, master_port=_free_port(host))
        self.address = Address(host, _free_port(host))
        self._nodes = start_nodes(config)
        self._reports: dict[str, tuple[float, Work]] = {}  # by frontend
        self._stop, serving = asyncio.Event(), asyncio.Event()
        curve = Curve.read(config.secret_file)
        self._task = asyncio.create_task(serve_engine(config, self.address, curve, serving, self._stop))
        waiting = asyncio.create_task(serving.wait())
        await asyncio.wait((self._task, waiting, *self._nodes), return_when=asyncio.FIRST_COMPLETED)
        if not serving.is_set():
            waiting.cancel()
            for task in (self._task, *self._nodes):
                if task.done():
                    task.result()
            raise RuntimeError("the engine ended while it loaded the model")

    async def meet(self, frontend: str, work: Mapping[str, Work]) -> str:
        """Note the work that a frontend has for each engine, by address. Returns the address of this one."""
        address = str(self.address)
        self._reports[frontend] = time.monotonic(), work.get(address, Work())
        return address

    async def wake(self) -> None:
        """Do nothing: a call that waits for an engine makes Ray start one."""

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the work of all frontends for this engine, for Ray's autoscaler."""
        since = time.monotonic() - FRESH
        self._reports = {name: report for name, report in self._reports.items() if report[0] > since}
        works = [work for _, work in self._reports.values()]
        return {
            QUEUED_TOKENS: sum(work.queued_tokens for work in works),
            QUEUED_SECONDS: sum(work.queued_seconds for work in works),
            REQUESTS: sum(work.requests for work in works),
        }

    def check_health(self) -> None:
        """Raise if the engine or one of its nodes has ended, so that Ray replaces this replica."""
        if self._task.done() or any(node.done() for node in self._nodes):
            raise RuntimeError("the engine has ended, or a node that it is divided over")

    async def __del__(self) -> None:
        self._stop.set()
        await asyncio.wait((self._task,))


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
