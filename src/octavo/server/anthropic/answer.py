"""Answers in the form of Anthropic's API: a message, or the events of its stream."""

import contextlib
import json
from typing import Any, Literal, TypedDict

from octavo.async_llm import Increment
from octavo.server.errors import ANTHROPIC, error_body
from octavo.server.openai.chat_generation import ChatGeneration
from octavo.server.openai.events import GenerationStream
from octavo.server.openai.replies import encode
from octavo.text.answer import Answer, AnswerEvent, ArgumentsDelta, ReasoningDelta, TextDelta, ToolCallStart

STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class Usage(TypedDict):
    """Numbers of tokens; `input_tokens` leaves out those that were found in the prefix cache."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class _End(TypedDict):
    stop_reason: str | None
    stop_sequence: str | None


class Message(_End):
    """A message of the model. `stop_sequence` is the stop string that ended it, if any."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    usage: Usage


def message(
    generation: ChatGeneration, content: list[Any], finish_reason: str | None, stop_reason: str | int | None
) -> Message:
    """Return a message with the tokens counted so far.

    Args:
        finish_reason: as in OpenAI's API; None for the message with which a stream starts.
        stop_reason: the stop string or token id that ended the answer, if any.
    """
    return {
        "id": generation.id,
        "type": "message",
        "role": "assistant",
        "model": generation.model,
        "content": content,
        **_end(finish_reason, stop_reason),
        "usage": _usage(generation),
    }


def content_blocks(answer: Answer) -> list[dict[str, Any]]:
    """Return the content blocks of a whole answer."""
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.text or not answer.tool_calls:
        blocks.append({"type": "text", "text": answer.text})
    for call in answer.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)})
    return blocks


def _input(arguments: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(arguments), dict):
            return value
    return {}  # of a call that max_tokens has cut off


def _end(finish_reason: str | None, stop_reason: str | int | None) -> _End:
    sequence = stop_reason if isinstance(stop_reason, str) and finish_reason == "stop" else None
    reason = "stop_sequence" if sequence is not None else STOP_REASONS.get(finish_reason or "", "end_turn")
    return {"stop_reason": reason if finish_reason else None, "stop_sequence": sequence}


def _usage(generation: ChatGeneration) -> Usage:
    record = generation.record
    prompt, cached = record.prompt_tokens or 0, record.cached_tokens or 0
    return {
        "input_tokens": prompt - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": record.completion_tokens or 0,
    }


def _event(kind: str, **data: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind, **data}))


class MessageStream(GenerationStream):
    """The stream of a message."""

    ping = _event("ping")

    def __init__(self, generation: ChatGeneration):
        super().__init__(generation)
        self._chat = generation
        self._begun = False
        self._blocks = BlockEvents()

    def events(self, increments: list[Increment]) -> bytes:
        """Return the events of increments of the only completion."""
        events = []
        for prompt, output in increments:
            self.generation.add(prompt, output)
            if not self._begun:
                self._begun = True
                events.append(_event("message_start", message=message(self._chat, [], None, None)))
            for new in output.outputs:
                events += [self._blocks.add(event) for event in self._chat.events(new)]
                if reason := self._chat.finish_reason(new):
                    events.append(self._blocks.end())
                    end = _end(reason, new.stop_reason)
                    events.append(_event("message_delta", delta=end, usage=_usage(self._chat)))
        return b"".join(events)

    def last_events(self) -> bytes:
        """Return the end of the message."""
        return _event("message_stop")

    def error_event(self, error: Exception) -> bytes:
        """Return an error as an event."""
        return _event("error", error=error_body(error, ANTHROPIC)[1]["error"])


class BlockEvents:
    """Returns the stream events of content blocks: each is started, extended and stopped before the next one."""

    def __init__(self) -> None:
        self._index = -1  # of the block that was started last
        self._kind: type | None = None  # of the events that extend the open block; None if none is open

    def add(self, event: AnswerEvent) -> bytes:
        """Return the stream events of a part of the answer."""
        match event:
            case TextDelta(text):
                started = self._start(TextDelta, {"type": "text", "text": ""})
                return started + self._delta({"type": "text_delta", "text": text})
            case ReasoningDelta(text):
                started = self._start(ReasoningDelta, {"type": "thinking", "thinking": "", "signature": ""})
                return started + self._delta({"type": "thinking_delta", "thinking": text})
            case ToolCallStart(_, id, name):
                block = {"type": "tool_use", "id": id, "name": name, "input": {}}
                return self._stop() + self._start(ArgumentsDelta, block)
            case ArgumentsDelta(_, text):
                return self._delta({"type": "input_json_delta", "partial_json": text})

    def end(self) -> bytes:
        """Return the stream events at the end of the answer. An empty answer is an empty text block."""
        started = self._start(TextDelta, {"type": "text", "text": ""}) if self._index < 0 else b""
        return started + self._stop()

    def _start(self, kind: type, block: dict[str, Any]) -> bytes:
        if self._kind is kind:
            return b""
        stopped = self._stop()
        self._kind, self._index = kind, self._index + 1
        return stopped + _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _stop(self) -> bytes:
        if self._kind is None:
            return b""
        self._kind = None
        return _event("content_block_stop", index=self._index)
