"""FollowedEngines: one replica for each engine that the addresses name, while engines come and go."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import zmq

from octavo.address import Address
from octavo.curve import Curve
from octavo.engine.messages import EngineInfo
from octavo.frontend.frontend import Frontend
from octavo.frontend.replica import Replica
from octavo.frontend.router import Load

from .link import RemoteLink
from .names import Names

LOOK = 1.0  # seconds between looks at the addresses
MAX_SOCKETS = 16_384  # each engine has three
MAX_PAUSE = 2.0  # seconds between attempts to reach an engine

log = logging.getLogger("octavo")


class FollowedEngines:
    """Keeps the replicas of a frontend equal to the engines behind some addresses.

    The addresses are looked up every LOOK seconds: the engine of each number that they stand for joins, and one for
    which they do not stand any more is drained; see Names.

    Args:
        digest: of the model that the engines must serve, see ModelFiles.
    """

    def __init__(self, frontend: Frontend, addresses: Sequence[Address], curve: Curve | None, digest: str):
        self._frontend, self._curve, self._digest = frontend, curve, digest
        self._names = Names(addresses)
        self._context: zmq.Context[Any] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._replicas: dict[Address, Replica] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        frontend.on_leaving = self._engine_leaves

    async def start(self) -> EngineInfo:
        """Wait until an engine is ready."""
        self._task = asyncio.create_task(self._follow())
        await self._frontend.was_ready.wait()
        return self._frontend.info

    def set(self, addresses: Sequence[Address]) -> None:
        """Follow other addresses from now on: engines of those that are not among them are drained at once."""
        self._names.set(addresses)
        self._changed.set()

    def loads(self) -> dict[str, Load]:
        """Return what the router knows about each engine, by address."""
        return {str(address): replica.load for address, replica in self._replicas.items()}

    async def close(self) -> None:
        """Stop following. The replicas are the frontend's to end."""
        for task in (*self._leaving, *([self._task] if self._task else [])):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._names.forget()
        self._replicas.clear()

    def destroy(self) -> None:
        """Free the connections, which the frontend must have closed."""
        self._context.destroy()

    async def _follow(self) -> None:
        while True:
            self._changed.clear()
            wanted = await self._names.look()
            if self._changed.is_set():  # they are not wanted any more
                continue
            for address in wanted:
                if address not in self._replicas:
                    self._join(address)
            for address in self._replicas.keys() - wanted:
                if not self._replicas[address].is_leaving:
                    log.warning("the engine at %s is no longer among those to use", address)
                    self._let_go(self._replicas[address])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK):
                    await self._changed.wait()

    def _join(self, address: Address) -> None:
        def connect(replica: Replica) -> RemoteLink:
            return RemoteLink(self._context, address, self._curve, self._digest, lambda: replica.readmission.is_open)

        name = f"engine {str(address).removeprefix('tcp://')}"
        self._replicas[address] = self._frontend.add_remote(connect, name, MAX_PAUSE)

    def _engine_leaves(self, replica: Replica) -> None:
        if replica in self._replicas.values() and not replica.is_leaving:
            log.warning("%s is being shut down; its requests go on elsewhere", replica.name)
            self._let_go(replica)

    def _let_go(self, replica: Replica) -> None:
        """Drain a replica. If its address is still among those to use afterwards, an engine there may join again."""
        if replica.is_leaving:
            return
        replica.is_leaving = True

        async def drain() -> None:
            await self._frontend.drain(replica)
            self._replicas = {address: other for address, other in self._replicas.items() if other is not replica}

        task = asyncio.create_task(drain())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
