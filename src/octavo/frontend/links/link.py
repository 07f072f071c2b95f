"""Link: one engine, from its start to its end, as a frontend sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from octavo.engine.work_record import Work

from .messages import FromEngine, ToEngine


class Link(Protocol):
    """A connection to one engine. The constructor starts loading. A frontend makes a new link when the engine ends.

    Attributes:
        pid: the id of the engine's process, or None if the engine is a thread of this process.
        heartbeats: whether the engine sends `Alive` messages regularly.
        is_remote: whether others run the engine.
        host: where other engines reach it; "" if they cannot.
    """

    @property
    def pid(self) -> int | None: ...

    @property
    def heartbeats(self) -> bool: ...

    @property
    def is_remote(self) -> bool: ...

    @property
    def host(self) -> str: ...

    async def connect(self, on_message: Callable[[FromEngine], None], on_end: Callable[[], None]) -> None:
        """Deliver messages to `on_message`, on the running event loop, until the engine ends; then call `on_end`."""
        ...

    def send(self, message: ToEngine) -> None:
        """Queue a message, in order, without waiting. Messages to an engine that has ended are dropped.

        Raises TypeError or ValueError if the message cannot be encoded.
        """
        ...

    async def close(self) -> None:
        """End the engine cleanly within seconds, and free its resources. No more messages are delivered."""
        ...

    async def kill(self) -> "Exit":
        """End the engine at once if it still runs, and return how it ended. No more messages are delivered."""
        ...


@dataclass(frozen=True, slots=True)
class Exit:
    """How an engine ended.

    Attributes:
        reason: text such as "exit code 1" or "killed by SIGSEGV".
        is_fault: whether the engine failed by itself, so that one of its requests may be the cause; False if it was
            killed from outside.
        work: the work that it was doing.
    """

    reason: str
    is_fault: bool
    work: Work = field(default_factory=Work)
