"""ResponseBuilder: assembles a response from parts of the model's output, and makes the events of its stream."""

import time
from collections.abc import Sequence
from typing import Any

from octavo.server.openai.replies import TokenLogprob, encode

from .items import output_id
from .objects import (
    FunctionCall,
    IncompleteDetails,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseError,
    ResponseObject,
)


class ResponseBuilder:
    """Fills in `response`. Each method returns the encoded events of what it has added.

    An output item is open from the first part of its text until another item begins or the response ends.

    Args:
        response: without output.
        summarize: whether reasoning goes to the item's summary instead of its content.
        encoded: whether events are used. If not, all methods return b"".
    """

    def __init__(self, response: ResponseObject, summarize: bool = False, encoded: bool = True):
        self.response = response
        self.events = 0  # so far
        self._summarize = summarize
        self._encoded = encoded
        self._open: OutputItem | None = None
        self._new_text: list[str] = []  # of the open item: joined when it ends

    def begin(self) -> bytes:
        """Begin the stream."""
        events = self._lifecycle("created")
        if self.response.status == "queued":
            events += self._lifecycle("queued")
            self.response.status = "in_progress"
        return events + self._lifecycle("in_progress")

    def add_text(self, delta: str, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        """Add to the answer's text."""
        events = b""
        if not isinstance(self._open, OutputMessage):
            events = self._begin_item(OutputMessage(id=self._id("message")))
            events += self._event("response.content_part.added", content_index=0, part=OutputText())
            self._open.content = [OutputText(logprobs=[])]  # type: ignore[union-attr]
        self._new_text.append(delta)
        self._open.content[0].logprobs.extend(logprobs)  # type: ignore[union-attr]
        return events + self._event("response.output_text.delta", content_index=0, delta=delta, logprobs=logprobs)

    def add_logprobs(self, logprobs: Sequence[TokenLogprob]) -> bytes:
        """Add logprobs of tokens that complete no text, unless the answer's text has not begun."""
        return self.add_text("", logprobs) if logprobs and isinstance(self._open, OutputMessage) else b""

    def add_reasoning(self, delta: str) -> bytes:
        """Add to the reasoning before the answer."""
        events = b""
        if not isinstance(self._open, ReasoningItem):
            events = self._begin_item(ReasoningItem(id=self._id("reasoning")))
            events += self._reasoning_event("part.added", part=self._reasoning_text(""))
        self._new_text.append(delta)
        return events + self._reasoning_event("text.delta", delta=delta)

    def begin_call(self, call_id: str, name: str) -> bytes:
        """Begin a call of a function."""
        return self._begin_item(FunctionCall(id=self._id("function_call"), call_id=call_id, name=name))

    def add_arguments(self, delta: str) -> bytes:
        """Add to the arguments, which are JSON, of the call that has begun last."""
        self._new_text.append(delta)
        return self._event("response.function_call_arguments.delta", delta=delta)

    def end(self, finish_reason: str | None) -> bytes:
        """End the response.

        Args:
            finish_reason: of the completion; "length" makes the response incomplete.
        """
        incomplete = finish_reason == "length"
        events = self._end_item("incomplete" if incomplete else "completed")
        if not incomplete and not self.response.output:
            events += self.add_text("") + self._end_item("completed")  # clients expect a message, even an empty one
        self.response.completed_at = int(time.time())
        if incomplete:
            self.response.status = "incomplete"
            self.response.incomplete_details = IncompleteDetails("max_output_tokens")
            return events + self._lifecycle("incomplete")
        self.response.status = "completed"
        return events + self._lifecycle("completed")

    def fail(self, code: str, message: str) -> bytes:
        """End the response with an error."""
        events = self._end_item("incomplete") + self._event("error", code=code, message=message, param=None)
        self.response.status, self.response.error = "failed", ResponseError("server_error", message)
        return events + self._lifecycle("failed")

    def cancel(self) -> bytes:
        """End the response because a client has cancelled it. OpenAI's API has no event of its own for it."""
        events = self._end_item("incomplete")
        self.response.status = "cancelled"
        return events + self._lifecycle("incomplete")

    def _begin_item(self, item: OutputItem) -> bytes:
        events = self._end_item("completed")
        self.response.output.append(item)
        self._open = item
        return events + self._event("response.output_item.added", item=item, item_id=None)

    def _end_item(self, status: ItemStatus) -> bytes:
        item, text = self._open, "".join(self._new_text)
        if item is None:
            return b""
        item.status = status
        match item:
            case OutputMessage():
                part = item.content[0]
                part.text = text
                logprobs = part.logprobs
                events = self._event("response.output_text.done", content_index=0, text=text, logprobs=logprobs)
                events += self._event("response.content_part.done", content_index=0, part=part)
            case FunctionCall():
                item.arguments = text
                done = "response.function_call_arguments.done"
                events = self._event(done, arguments=text, name=item.name)
            case ReasoningItem():
                part_of_reasoning = self._reasoning_text(text)
                if self._summarize:
                    item.summary = [part_of_reasoning]
                else:
                    item.content = [part_of_reasoning]
                events = self._reasoning_event("text.done", text=text)
                events += self._reasoning_event("part.done", part=part_of_reasoning)
        events += self._event("response.output_item.done", item=item, item_id=None)
        self._open = None
        self._new_text = []
        return events

    def _id(self, kind: str) -> str:
        return output_id(kind, self.response.id, len(self.response.output))

    def _reasoning_text(self, text: str) -> ReasoningText:
        return ReasoningText(type="summary_text" if self._summarize else "reasoning_text", text=text)

    def _reasoning_event(self, name: str, **fields: Any) -> bytes:
        """Return an event of a reasoning item, named for its summary or its content."""
        if self._summarize:
            return self._event(f"response.reasoning_summary_{name}", summary_index=0, **fields)
        kind = "response.content_" if name.startswith("part") else "response.reasoning_"
        return self._event(kind + name, content_index=0, **fields)

    def _lifecycle(self, name: str) -> bytes:
        return self._event(f"response.{name}", response=self.response, item_id=None, output_index=None)

    def _event(self, kind: str, **fields: Any) -> bytes:
        """Return one server-sent event. Those of an item get its id and position; a field that is None is left out."""
        if not self._encoded:
            return b""
        content = {"type": kind, "sequence_number": self.events}
        if self._open is not None:
            content |= {"item_id": self._open.id, "output_index": len(self.response.output) - 1}
        content |= fields
        content = {name: value for name, value in content.items() if value is not None or name == "param"}
        self.events += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(content))
