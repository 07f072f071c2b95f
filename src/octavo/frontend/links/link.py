"""Link: one engine, from its start to its end, as a frontend sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from octavo.engine.work_record import Work

from .messages import FromEngine, ToEngine


class Link(Protocol):
    """One engine that loads from the constructor on. A frontend replaces it by a new one when it ends.

    Attributes:
        pid: of the engine's process, or None if it is a thread of this one.
        heartbeats: whether the engine sends `Alive` messages, so that its silence means something.
    """

    @property
    def pid(self) -> int | None: ...

    @property
    def heartbeats(self) -> bool: ...

    async def connect(self, on_message: Callable[[FromEngine], None], on_end: Callable[[], None]) -> None:
        """Deliver messages to `on_message`, on the running event loop, until the engine ends; then call `on_end`."""
        ...

    def send(self, message: ToEngine) -> None:
        """Queue a message, in order, without waiting. Messages to an engine that has ended are dropped.

        Raises TypeError or ValueError if the message cannot be encoded.
        """
        ...

    async def close(self) -> None:
        """End the engine in good order, within seconds, and free what it used. Nothing is delivered from now on."""
        ...

    async def kill(self) -> "Exit":
        """End the engine at once if it has not ended yet. Return how it ended. Nothing is delivered from now on."""
        ...


@dataclass(frozen=True, slots=True)
class Exit:
    """How an engine ended.

    Attributes:
        reason: for people, such as "exit code 1" or "killed by SIGSEGV".
        is_fault: whether the engine failed by itself, so that one of its requests may be the cause; False if it was
            killed from outside.
        work: what it was busy with.
    """

    reason: str
    is_fault: bool
    work: Work = field(default_factory=Work)
