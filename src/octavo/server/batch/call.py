"""Send requests to an ASGI application in the same process, without a socket."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.traffic import INTERNAL


@dataclass(frozen=True)
class Reply:
    """A whole response."""

    status: int
    request_id: str
    body: bytes


async def call(app: Any, path: str, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> Reply:
    """Post JSON to a route of `app` and return the whole response. Cancelling the caller aborts the request.

    Args:
        headers: added to the request, with names in lower case.
    """
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": quote(path).encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers],
        "client": None,
        "server": None,
        INTERNAL: True,
    }
    exchange = _Exchange(body, RequestRecord.of(scope))
    await app(scope, exchange.receive, exchange.send)
    task = asyncio.current_task()
    if task is not None and task.cancelling():  # the application answers a cancelled request with an error
        raise asyncio.CancelledError
    return Reply(exchange.status, RequestRecord.of(scope).id, b"".join(exchange.parts))


class _Exchange:
    """The two channels between a server and an application, for one request."""

    def __init__(self, body: bytes, record: RequestRecord):
        self._body: bytes | None = body
        self._record = record
        self.status = 500
        self.parts: list[bytes] = []

    async def receive(self) -> dict[str, Any]:
        if self._body is None:
            await asyncio.Event().wait()  # this client never disconnects
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = self._record.status = message["status"]
        else:
            self.parts.append(message.get("body", b""))
            self._record.complete = not message.get("more_body", False)
