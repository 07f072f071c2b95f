"""ReasoningParser: the base of parsers that separate a model's reasoning from its answer."""

from typing import ClassVar

import msgspec

from octavo.params import StructuredOutputs
from octavo.text.reader import AnswerParser


class ReasoningParser(AnswerParser):
    """Base of parsers of reasoning.

    Attributes:
        starts, ends: Texts that begin and end the reasoning, the usual one first.
        begins_inside: Whether the answer begins within the reasoning, because the prompt has its start, or because the
            model always reasons.
    """

    starts: ClassVar[tuple[str, ...]]
    ends: ClassVar[tuple[str, ...]]
    begins_inside = False

    @classmethod
    def after_reasoning(cls, outputs: StructuredOutputs, begins_inside: bool) -> StructuredOutputs:
        """Return a constraint that begins after the reasoning.

        Args:
            begins_inside: whether the prompt has the start of the reasoning.
        """
        starts = None if begins_inside or cls.begins_inside else list(cls.starts)
        return msgspec.structs.replace(outputs, reasoning_end=list(cls.ends), reasoning_start=starts)
