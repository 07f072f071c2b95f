"""What a request owes to its connection: it ends when the client leaves, and it streams events without a pause."""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.server.errors import CLIENT_LEFT, ServerStopping, error_reply, expected
from octavo.server.openai.events import EventWriter, event

PING = b": waiting\n\n"  # a comment, which clients skip
PING_SECONDS = 15.0  # proxies hang up on silence, often after 60

Result = TypeVar("Result")

log = logging.getLogger("octavo.server")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`; None if the client left first: then the work was cancelled.

    Call it when the body has been read: what `receive` brings then is the disconnect. Raises ServerStopping if this
    task is cancelled, which only the server does, when its patience in shutting down ends.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    except asyncio.CancelledError:
        raise ServerStopping from None
    finally:
        leaving.cancel()
        if task.cancel():
            await asyncio.wait((task,))  # its generators close, so its requests leave the engine


async def reply_while_connected(receive: Receive, work: Coroutine[Any, Any, Response]) -> Response:
    """`while_connected` for a reply that is not streamed; to a client that has left, any will do."""
    return await while_connected(receive, work) or Response(status_code=CLIENT_LEFT)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of a generation. If it fails, the error becomes the last event.

    The status line waits for the first event, so that a request refused by then gets its error's status. If that takes
    long (the request queues), comments keep the connection alive.
    """

    def __init__(self, writer: EventWriter):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # no proxy is to hold events back
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._writer = writer
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._stream(send))
        except Exception as error:
            if not self._started:
                raise
            if not expected(error):
                log.exception("a stream failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):  # a client that does not read must not hold up the server's end
                    await send(_part(event(error_reply(error)[1]), more=False))

    async def _stream(self, send: Send) -> None:
        pings = asyncio.ensure_future(self._ping(send))
        try:
            async with contextlib.aclosing(self._writer.generation.increments()) as steps:
                async for increments in steps:
                    if told := self._writer.tell(increments):
                        pings.cancel()
                        await self._start(send)
                        await send(_part(told))
            await self._start(send)
            await send(_part(self._writer.end(), more=False))
        finally:
            pings.cancel()

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            await self._start(send)
            await send(_part(PING))

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})


def _part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}
