"""EventResponse: sends the events of a response as server-sent events."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.server.errors import ServerStopping


class EventResponse(Response):
    """Sends what `events` yields. An error before the first event is raised, so that it is answered with its status.

    Args:
        interrupted: returns the last events if the server ends before the stream does.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], interrupted: Callable[[Exception], bytes]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies must not buffer events
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self._interrupted = interrupted
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._events) as events:
                async for part in events:
                    await self._send(send, part)
            await self._send(send, b"", more=False)
        except asyncio.CancelledError:  # the drain timeout is over, or the client has disconnected
            if not self._started:
                raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):  # a client that does not read must not delay the server's end
                    await self._send(send, self._interrupted(ServerStopping()), more=False)

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body, "more_body": more})
