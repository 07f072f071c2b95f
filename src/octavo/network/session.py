"""Session: one frontend, as the host of an engine sees it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from octavo.engine.messages import EngineRequest
from octavo.frontend.links.messages import FromEngine

from .protocol import MAX_MESSAGE, NO_TERM, FromHost, encode


@dataclass(eq=False, slots=True)
class Session:
    """A frontend from its hello to the end of either side.

    Args:
        identity: ZeroMQ's name of its connection.
        term: the number of this session; see protocol.py.
        put: queues the frames of a message; returns False if there is no room.

    Attributes:
        ids: its live requests.
        pins: its KV states that are pinned.
        is_watching: whether it has all pages of the cache, and gets those that change.
        wants_pages: whether it has asked for them; wants_content: and for their tokens.
        silent_beats: beats since its last message.
        is_ready: whether it was told that the engine is ready.
        is_open: whether it has no request on trial.
        held: requests that wait for the end of another frontend's turn.
        is_lost: whether a message found no room, so that the session must end.
    """

    identity: bytes
    term: bytes
    put: Callable[[Sequence[bytes]], bool]
    ids: set[str] = field(default_factory=set)
    pins: set[str] = field(default_factory=set)
    is_watching: bool = False
    wants_pages: bool = False
    wants_content: bool = False
    silent_beats: int = 0
    is_ready: bool = False
    is_open: bool = True
    held: list[EngineRequest] = field(default_factory=list)
    is_lost: bool = False

    def send(self, message: FromEngine) -> bool:
        """Send a message of the engine. Return False if it is too long to be sent."""
        return self.pass_on(encode(message))

    def pass_on(self, payload: bytes) -> bool:
        """Send an encoded message of the engine. Return False if it is too long to be sent."""
        if len(payload) > MAX_MESSAGE:
            return False
        self.is_lost |= not self.put((self.identity, self.term, payload))
        return True

    def tell(self, message: FromHost) -> None:
        """Send a message about the session."""
        self.put((self.identity, NO_TERM, encode(message)))
