"""Run: a response while it is generated."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

import msgspec

from octavo.async_llm import Increment
from octavo.outputs import RequestOutput
from octavo.server.edge.dispatch import note_error
from octavo.server.errors import error_reply, is_expected
from octavo.server.openai.chat_generation import ChatGeneration
from octavo.server.openai.events import PING, PING_SECONDS
from octavo.server.openai.replies import TokenLogprob
from octavo.text.answer import AnswerEvent, ArgumentsDelta, ReasoningDelta, TextDelta, ToolCallStart

from .builder import ResponseBuilder
from .items import Item
from .objects import InputTokensDetails, OutputTokensDetails, ResponseObject, ResponseUsage
from .store import StoredResponse

BEGIN_SECONDS = 1.0  # a stream begins after this time even if there is no output yet

log = logging.getLogger("octavo.server")


@dataclass
class Run:
    """A response while it is generated.

    Args:
        builder: has the response.
        tenant: the tenant that owns the response.
        input: the request's own input items.
        put: stores a response.
    """

    generation: ChatGeneration
    builder: ResponseBuilder
    tenant: str
    input: list[Item]
    put: Callable[[StoredResponse], Awaitable[None]]
    _finish_reason: str | None = None
    _logprobs: list[TokenLogprob] = field(default_factory=list)  # of tokens since the last part of the answer

    @property
    def response(self) -> ResponseObject:
        """Return the response as it is now."""
        return self.builder.response

    async def whole(self) -> ResponseObject:
        """Generate and store the response, and return it. If the caller is cancelled, its request is aborted."""
        if self.generation.params.logprobs is None:
            [output] = await self.generation.whole()
            self._add(output)
        else:  # a part of the output at a time, since only the logprobs of the answer's text are returned
            async with contextlib.aclosing(self.output()) as steps:
                async for increments in steps:
                    self.add(increments)
        self.end()
        await self.save()
        return self.response

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Generate and store the response, and yield its encoded events. Closing the generator aborts the request.

        The first events wait for the first output, for a second at most, so that an error before it is raised. Later
        errors become events. While there is no output, comments keep the connection alive.
        """
        begun = False
        try:
            async with contextlib.aclosing(self.output()) as steps:
                async for increments in steps:
                    if not begun:
                        begun = True
                        yield self.builder.begin()
                    elif increments is None:
                        yield PING
                    if events := self.add(increments):
                        yield events
            last = self.end()
        except Exception as error:
            if not begun:
                raise
            last = self.fail(error)
        await self.save()
        yield last

    async def output(self) -> AsyncGenerator[list[Increment] | None, None]:
        """Yield the increments of the output, to be passed to `add`. Closing the generator aborts the request.

        Yields None when the first increment takes long, and again every PING_SECONDS until there is one.
        """
        async with contextlib.aclosing(self.generation.increments()) as steps:
            first = asyncio.ensure_future(anext(steps))
            try:
                patience = BEGIN_SECONDS
                while not (await asyncio.wait([first], timeout=patience))[0]:
                    yield None
                    patience = PING_SECONDS
                yield first.result()
            finally:
                if not first.done():
                    first.cancel()
                    await asyncio.wait([first])
            async for increments in steps:
                yield increments

    def add(self, increments: list[Increment] | None) -> bytes:
        """Add increments of the output to the response, and return the events."""
        events = []
        for prompt, output in increments or ():
            self.generation.add(prompt, output)
            events.append(self._add(output))
        return b"".join(events)

    def end(self) -> bytes:
        """End the response, and return the last events."""
        self._count()
        return self.builder.add_logprobs(self._logprobs) + self.builder.end(self._finish_reason)

    def cancel(self) -> bytes:
        """End the response because its client has cancelled it, and return the last events."""
        self._count()
        return self.builder.cancel()

    def fail(self, error: Exception) -> bytes:
        """End the response with an error, and return the last events."""
        if not is_expected(error):
            log.error("a response failed", exc_info=error)
        note_error(self.generation.record, error)
        body = error_reply(error)[1].error
        self._count()
        return self.builder.fail(body.code or body.type, body.message)

    async def save(self, events: bytes | None = None) -> None:
        """Store the response if the request asks for it. A failure to do so is logged, and shown in the response.

        Args:
            events: of its stream, to be stored too.
        """
        if not self.response.store:
            return
        try:
            await self.put(self.stored(events))
        except Exception:
            log.exception("a response could not be stored")
            self.response.store = False

    def stored(self, events: bytes | None = None) -> StoredResponse:
        """Return the response in the form in which it is stored."""
        return StoredResponse(
            id=self.response.id,
            tenant=self.tenant,
            previous=self.response.previous_response_id,
            status=self.response.status,
            input=self.input,
            response=msgspec.to_builtins(self.response),
            events=events,
        )

    def _add(self, output: RequestOutput) -> bytes:
        """Add an increment, or the whole output, to the response. Return the events."""
        self.response.seed = output.seed
        [new] = output.outputs
        given = self.generation.logprobs.chat(new, self.generation.params.logprobs)
        if given is not None:
            self._logprobs += given.content
        events = b"".join([self._part(part) for part in self.generation.events(new)])
        self._finish_reason = self.generation.finish_reason(new)
        return events

    def _part(self, part: AnswerEvent) -> bytes:
        """Add a part of the answer. The logprobs since the part before belong to it, and only a text has some."""
        logprobs, self._logprobs = self._logprobs, []
        match part:
            case TextDelta(text):
                return self.builder.add_text(text, logprobs)
            case ReasoningDelta(text):
                return self.builder.add_reasoning(text)
            case ToolCallStart(_, id, name):
                return self.builder.begin_call(id, name)
            case ArgumentsDelta(_, text):
                return self.builder.add_arguments(text)

    def _count(self) -> None:
        """Set the response's usage."""
        usage = self.generation.usage
        self.response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(0),
            total_tokens=usage.total_tokens,
        )
