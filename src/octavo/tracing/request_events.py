"""RequestEvents: what an engine does with traced requests, for the frontend's traces and spans."""

import time

import msgspec

ADMITTED, CHUNK, PREEMPTED = "admitted", "chunk", "preempted"


class RequestEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What an engine has done with a completion.

    Attributes:
        sequence: the engine's id of the completion.
        name: ADMITTED, CHUNK (tokens of the prompt are computed) or PREEMPTED.
        time: in seconds of time.monotonic().
        tokens: cached tokens of an admitted completion; tokens of a chunk.
    """

    sequence: str
    name: str
    time: float
    tokens: int = 0


class RequestEvents:
    """Collects the events of an engine's requests until its link sends them."""

    def __init__(self) -> None:
        self._events: list[RequestEvent] = []

    def add(self, sequence: str, name: str, tokens: int = 0) -> None:
        """Record that something happens now to the completion with the engine's id `sequence`."""
        self._events.append(RequestEvent(sequence, name, time.monotonic(), tokens))

    def take(self) -> list[RequestEvent]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events
