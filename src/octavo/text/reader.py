"""Incremental parsing of answers: a parser is a generator that reads text as if all of it were there.

`AnswerParser.push` continues the generator with more text. So a parser is written as plain sequential code, and does
not depend on how the text is cut into pieces.
"""

import json
import re
import uuid
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from .answer import AnswerEvent, ArgumentsDelta, ReasoningDelta, TextDelta, ToolCallStart
from .json_scanner import JsonScanner

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A part of a parser: yields when it needs more text, and returns a T."""


_SYNTAX = " \t\r\n,;)]}"  # of calls: meaningless after a complete call, where the answer ends
_WORD = re.compile(r"[\w.-]+")


class Malformed(Exception):
    """The text is not what the format requires at this place."""


class EndOfAnswer(Malformed):
    """The answer ended where the format requires more."""


class AnswerParser:
    """Base of parsers of a model's output.

    A subclass defines `parse`. All text that it does not turn into events comes back as TextDelta.

    Args:
        schemas: The parameters of each function that may be called, as JSON schema, by the function's name.
        streaming: Emit a call's arguments while they are generated. Otherwise a call is emitted when it is complete, so
            that a malformed or truncated one comes back as text.
    """

    def __init__(self, schemas: dict[str, Any] | None = None, streaming: bool = True) -> None:
        self.schemas = schemas or {}
        self._streaming = streaming
        self._buffer, self._at, self._is_end = "", 0, False
        self._events: list[AnswerEvent] = []
        self._held: list[AnswerEvent] = []  # events of a call that may still turn out to be malformed
        self._space = ""  # the end of the text so far, left out if a call follows
        self._has_reasoning, self._reasoning_space = False, ""
        self._num_calls = 0
        self._emitted_to: int | None = None  # position in the buffer after what `attempt` has emitted
        self._run = self._whole()
        next(self._run, None)

    def push(self, text: str) -> list[AnswerEvent]:
        """Return the events that are final after more text of the answer."""
        self._buffer += text
        return self._continue() if text else []

    def finish(self) -> list[AnswerEvent]:
        """Return the last events, at the end of the answer."""
        self._is_end = True
        return self._continue()

    def _continue(self) -> list[AnswerEvent]:
        next(self._run, None)
        events, self._events = self._events, []
        return events

    def _whole(self) -> Reading[None]:
        yield from self.parse()
        yield from self.rest()
        if not self._num_calls:
            self._text(self._space)

    def parse(self) -> Reading[None]:
        """Read the whole answer. What is left unread becomes text."""
        raise NotImplementedError

    # Reading

    @property
    def at_end(self) -> bool:
        """Return whether all text has been read and no more will come."""
        return self._is_end and self._at == len(self._buffer)

    def more(self) -> Reading[None]:
        """Wait for more text. Raises EndOfAnswer."""
        if self._is_end:
            raise EndOfAnswer
        yield

    def lookahead(self, *literals: str) -> Reading[str | None]:
        """Return the first of the literals that the text continues with, without reading it, or None."""
        while True:
            ahead = self._buffer[self._at :]
            for literal in literals:
                if ahead.startswith(literal):
                    return literal
                if literal.startswith(ahead) and not self._is_end:
                    break
            else:
                return None
            yield from self.more()

    def accept(self, *literals: str) -> Reading[str | None]:
        """Read one of the literals and return it, or return None if the text continues with none of them."""
        found = yield from self.lookahead(*literals)
        self._at += len(found or "")
        return found

    def expect(self, *literals: str) -> Reading[str]:
        """Read one of the literals and return it. Raises Malformed."""
        found = yield from self.accept(*literals)
        if found is None:
            raise EndOfAnswer if self.at_end else Malformed
        return found

    def skip_space(self) -> Reading[None]:
        """Read white space."""
        while True:
            while self._at < len(self._buffer):
                if not self._buffer[self._at].isspace():
                    return
                self._at += 1
            if self._is_end:
                return
            yield from self.more()

    def until(self, literal: str, longest: int = 1 << 30) -> Reading[str]:
        """Read up to and including `literal`, and return the text before it.

        Raises Malformed if the text before it has more than `longest` characters, and EndOfAnswer.
        """
        searched = self._at
        while (end := self._buffer.find(literal, searched)) < 0:
            searched = max(self._at, len(self._buffer) - len(literal) + 1)
            if searched - self._at > longest:
                raise Malformed
            yield from self.more()
        before, self._at = self._buffer[self._at : end], end + len(literal)
        if len(before) > longest:
            raise Malformed
        return before

    def emit_until(self, emit: Callable[[str], None], *markers: str) -> Reading[str | None]:
        """Emit text up to the first of the markers, read the marker and return it; None at the end of the answer."""
        while True:
            found = [(at, marker) for marker in markers if (at := self._buffer.find(marker, self._at)) >= 0]
            if found:
                at, marker = min(found)
                emit(self._buffer[self._at : at])
                self._at = at + len(marker)
                return marker
            safe = len(self._buffer) - (0 if self._is_end else self._partial(markers))
            emit(self._buffer[self._at : safe])
            self._buffer, self._at = self._buffer[safe:], 0
            if self._is_end:
                return None
            yield from self.more()

    def _partial(self, markers: tuple[str, ...]) -> int:
        """Return the length of the longest end of the buffer that may be the beginning of a marker."""
        rest = len(self._buffer) - self._at
        for length in range(min(max(map(len, markers), default=1) - 1, rest), 0, -1):
            end = self._buffer[len(self._buffer) - length :]
            if any(marker.startswith(end) for marker in markers):
                return length
        return 0

    def rest(self) -> Reading[None]:
        """Emit all text that is left."""
        yield from self.emit_until(self.text)

    def closing(self, *literals: str) -> Reading[bool]:
        """Read one of the literals after white space, or the beginning of one at the end of the answer.

        Return whether the text continued with one.
        """
        yield from self.skip_space()
        found = yield from self.accept(*literals)
        if not found and self._is_end and any(each.startswith(self._buffer[self._at :]) for each in literals):
            self._at = len(self._buffer)
        return bool(found) or self.at_end

    def word(self) -> Reading[str]:
        """Read a name of letters, digits, "_", "-" and ".". Raises Malformed if there is none, or a very long one."""
        start = self._at
        while True:
            match = _WORD.match(self._buffer, start)
            end = match.end() if match else start
            if end - start > 256:
                raise Malformed
            if end < len(self._buffer) or self._is_end:
                break
            yield from self.more()
        self._at = end
        if end == start:
            raise EndOfAnswer if self.at_end else Malformed
        return self._buffer[start:end]

    def json_value(self, stream: bool = False) -> Reading[str]:
        """Read a JSON value and return its text. With `stream`, emit it as arguments meanwhile. Raises Malformed."""
        scanner, pieces = JsonScanner(), []
        while not scanner.is_complete:
            if self._at == len(self._buffer):
                yield from self.more()
            end = scanner.feed(self._buffer, self._at)
            if piece := self._buffer[self._at : end]:
                self._at = end
                pieces.append(piece)
                if stream:
                    self.arguments(piece)
            if end < len(self._buffer) and not scanner.is_complete:
                raise Malformed
        return "".join(pieces)

    def attempt(self, call: Reading[None], marker: str = "") -> Reading[bool]:
        """Read a call with `call`; if it is malformed, its text comes back as text. Return whether it was a call.

        Args:
            marker: What has been read of the call before.
        """
        start, resume = self._at - len(marker), self._at
        space, self._space, self._emitted_to = self._space, "", None
        try:
            yield from call
        except Malformed as error:
            self._num_calls -= sum(isinstance(event, ToolCallStart) for event in self._held)
            self._held.clear()
            if self._emitted_to is None:
                self._space = space
            else:  # a call has been emitted, which cannot be taken back
                start = resume = self._emitted_to
                if isinstance(error, EndOfAnswer) and not self._buffer[start:].strip(_SYNTAX):
                    start = resume = len(self._buffer)
            self.text(self._buffer[start:resume])
            self._at = resume
            if isinstance(error, EndOfAnswer):
                yield from self.rest()
            return False
        return True

    # Emitting

    def text(self, text: str) -> None:
        """Emit text. White space is held back, since it is left out before and after calls."""
        if not text:
            return
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._text(kept)

    def _text(self, text: str) -> None:
        if text:
            self._events.append(TextDelta(text))

    def reasoning(self, text: str) -> None:
        """Emit reasoning, without the white space around it."""
        text = self._reasoning_space + text
        kept = text.rstrip()
        self._reasoning_space = text[len(kept) :]
        if not self._has_reasoning:
            kept = kept.lstrip()
        if kept:
            self._has_reasoning = True
            self._events.append(ReasoningDelta(kept))

    def start_call(self, name: str) -> None:
        """Emit the beginning of a call."""
        self._emit(ToolCallStart(self._num_calls, self.new_id(), name))
        self._num_calls += 1

    def arguments(self, text: str) -> None:
        """Emit a piece of the arguments of the call that was started last."""
        if text:
            self._emit(ArgumentsDelta(self._num_calls - 1, text))

    def end_call(self) -> None:
        """Mark the call that was started last as complete."""
        self._events += self._held
        self._held.clear()
        self._emitted_to = self._at

    def call(self, name: Any, arguments: Any) -> None:
        """Emit a whole call. Raises Malformed if the name is no text or the arguments are no JSON object."""
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if not isinstance(name, str) or not name or not is_object(text):
            raise Malformed
        self.start_call(name)
        self.arguments(text)
        self.end_call()

    def streamed_call(self, name: str) -> Reading[None]:
        """Read a JSON object as the arguments of a call, and emit them meanwhile; `end_call` is left to do.

        Raises Malformed.
        """
        yield from self.skip_space()
        if not (yield from self.lookahead("{")):
            raise EndOfAnswer if self.at_end else Malformed
        self.start_call(name)
        yield from self.json_value(stream=True)

    def _emit(self, event: AnswerEvent) -> None:
        self._held.append(event)
        if self._streaming:
            self.end_call()

    def new_id(self) -> str:
        """Return the id of a new call."""
        return f"call_{uuid.uuid4().hex[:24]}"


def is_object(text: str) -> bool:
    """Return whether `text` is a JSON object."""
    return isinstance(loads(text), dict)


def loads(text: str) -> Any:
    """Return the value of JSON text. Raises Malformed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Malformed from None
