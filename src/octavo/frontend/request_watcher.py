"""RequestWatcher: what a frontend tells those who follow its requests, such as a trace file and spans."""

from typing import Protocol

from octavo.tracing.request_events import RequestEvent

from .live import LiveRequest
from .replica import Replica


class RequestWatcher(Protocol):
    """Follows the requests and engines of one model. The methods are called on the frontend's event loop."""

    def engine_ready(self, replica: Replica) -> None:
        """Note that an engine serves from now on."""

    def engine_lost(self, replica: Replica, reason: str) -> None:
        """Note that an engine has ended unexpectedly."""

    def engine_times(self, records: bytes) -> None:
        """Note the times of an engine's steps; see EngineTrace."""

    def arrived(self, live: LiveRequest, reply_id: str) -> None:
        """Note the begin of a request, with the id that a server's client sees in the reply, if there is one."""

    def sent(self, live: LiveRequest, replica: Replica) -> None:
        """Note that a request is sent to an engine, for the first time or again."""

    def happened(self, live: LiveRequest, replica: Replica, event: RequestEvent) -> None:
        """Note what an engine has done with a completion of a request."""

    def first_token(self, live: LiveRequest) -> None:
        """Note that a request has got its first token."""

    def ended(self, live: LiveRequest, reason: str | None = None) -> None:
        """Note the end of a request.

        Args:
            reason: why it ended before its output was complete; by default the finish reasons of its completions.
        """

    def close(self) -> None:
        """Note that there will be no more requests."""
