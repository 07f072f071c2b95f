"""gpt-oss: reasoning is on the channel "analysis" of the harmony format."""

from typing import ClassVar

import msgspec

from octavo.params import StructuredOutputs
from octavo.text.tools.openai import Harmony

from .parser import ReasoningParser


class HarmonyReasoning(Harmony, ReasoningParser):
    """Parser of reasoning and text for requests without tools."""

    starts: ClassVar[tuple[str, ...]] = ("<|channel|>analysis<|message|>",)
    ends: ClassVar[tuple[str, ...]] = ("<|end|>",)
    with_calls = False

    @classmethod
    def after_reasoning(cls, outputs: StructuredOutputs, begins_inside: bool) -> StructuredOutputs:
        """Return a constraint of the message on the channel "final"."""
        return msgspec.structs.replace(outputs, reasoning_format="harmony")
