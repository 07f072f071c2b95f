"""Stream a generation as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.async_llm import Increment
from octavo.outputs import CompletionOutput
from octavo.server.edge.dispatch import note_error
from octavo.server.errors import ServerStopping, error_reply, is_expected

from .generation import Generation
from .replies import ChatChunk, Completion, encode

DONE = b"data: [DONE]\n\n"
PING = b": waiting\n\n"  # a comment, which clients ignore
PING_SECONDS = 15.0  # between comments; proxies close silent connections, often after 60 s

log = logging.getLogger("octavo.server")


def event(data: Any) -> bytes:
    """Encode `data` as one server-sent event. It takes one line, as JSON contains no bare newlines."""
    return b"data: %b\n\n" % encode(data)


class GenerationStream(Response):
    """Base of the responses that stream a generation, in one format each. An error becomes the last event.

    The header is held back until the first event, so that a request that fails before it gets the status of its error.
    While a request waits in the queue, `ping` keeps the connection alive.
    """

    media_type = "text/event-stream"
    ping = PING

    def __init__(self, generation: Generation):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies must not buffer events
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self.generation = generation
        self._started = False
        self._has_events = False
        self._pings: asyncio.Task[None] | None = None

    def events(self, increments: list[Increment]) -> bytes:
        """Return the events of increments, whose tokens it adds to the generation; b"" if they make no event."""
        raise NotImplementedError

    def last_events(self) -> bytes:
        """Return the events that follow the last increment."""
        raise NotImplementedError

    def error_event(self, error: Exception) -> bytes:
        """Return the event of an error after the first event."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pings = asyncio.get_running_loop().call_later(PING_SECONDS, self._start_pings, send)
        try:
            async with contextlib.aclosing(self.generation.increments()) as steps:
                async for increments in steps:
                    if events := self.events(increments):
                        self._has_events = True
                        pings.cancel()
                        await self._send(send, events)
            await self._send(send, self.last_events(), more=False)
        except asyncio.CancelledError:  # the drain timeout is over, or the client has disconnected
            if not self._started:
                raise
            await self._send_error(send, ServerStopping())
        except Exception as error:
            if not self._started:
                raise
            if not is_expected(error):
                log.exception("a stream failed")
            await self._send_error(send, error)
        finally:
            pings.cancel()
            if self._pings is not None:
                self._pings.cancel()

    def _start_pings(self, send: Send) -> None:
        if self.ping:
            self._pings = asyncio.ensure_future(self._ping(send))

    async def _ping(self, send: Send) -> None:
        while not self._has_events:
            await self._send(send, self.ping)
            await asyncio.sleep(PING_SECONDS)

    async def _send_error(self, send: Send, error: Exception) -> None:
        note_error(self.generation.record, error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):  # a client that does not read must not delay the server's end
                await self._send(send, self.error_event(error), more=False)

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body, "more_body": more})


class EventStream(GenerationStream):
    """The stream of a completion or chat completion, as in OpenAI's API.

    Args:
        chunk: the fields that all chunks have in common; the same object is filled in and encoded for every chunk.
        choices: called with the index of a prompt and an increment of one of its completions; returns the choices, each
            of which is sent in a chunk of its own.
        include_usage, continuous_usage: the request's options of these names.
    """

    def __init__(
        self,
        generation: Generation,
        chunk: Completion | ChatChunk,
        choices: Callable[[int, CompletionOutput], Iterable[Any]],
        include_usage: bool,
        continuous_usage: bool,
    ):
        super().__init__(generation)
        self._chunk = chunk
        self._choices = choices
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._with_seed = len(generation.prompts) == 1
        chunk.usage = None if include_usage else msgspec.UNSET

    def events(self, increments: list[Increment]) -> bytes:
        """Return the events of increments; b"" if they are of no use to a client."""
        chunk, generation = self._chunk, self.generation
        events = []
        for prompt, output in increments:
            generation.add(prompt, output)
            chunk.seed = output.seed if self._with_seed else msgspec.UNSET
            self._with_seed = False
            if self._continuous_usage:
                chunk.usage = generation.usage
            for new in output.outputs:
                for choice in self._choices(prompt, new):
                    chunk.choices = [choice]
                    events.append(event(chunk))
        return b"".join(events)

    def last_events(self) -> bytes:
        """Return the last events: usage and the kept KV state, if requested, and the end of the stream."""
        chunk = self._chunk
        chunk.kv_cache_state = self.generation.kept_state()
        if not self._include_usage and chunk.kv_cache_state is msgspec.UNSET:
            return DONE
        chunk.choices = []
        if self._include_usage:
            chunk.usage = self.generation.usage
        return event(chunk) + DONE

    def error_event(self, error: Exception) -> bytes:
        """Return OpenAI's error object as an event."""
        return event(error_reply(error)[1])
