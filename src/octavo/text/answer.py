"""The parts of an answer: text, reasoning and tool calls, as events of a stream and as a whole."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the model's reasoning, which comes before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The beginning of a tool call. Its arguments follow as ArgumentsDelta of the same index.

    Attributes:
        index: The call's number in the answer, from 0.
        id: Unique, such as "call_1f0c...".
        name: Of the function.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """A piece of a tool call's arguments. The pieces of a call add up to a JSON object."""

    index: int
    text: str


AnswerEvent = TextDelta | ReasoningDelta | ToolCallStart | ArgumentsDelta


@dataclass(slots=True)
class ToolCall:
    """A call of a function. `arguments` is JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """A whole answer, collected from its events."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, events: Iterable[AnswerEvent]) -> None:
        """Add the events of a part of the answer."""
        for event in events:
            match event:
                case TextDelta(text):
                    self.text += text
                case ReasoningDelta(text):
                    self.reasoning += text
                case ToolCallStart(_, id, name):
                    self.tool_calls.append(ToolCall(id, name))
                case ArgumentsDelta(index, text):
                    self.tool_calls[index].arguments += text
