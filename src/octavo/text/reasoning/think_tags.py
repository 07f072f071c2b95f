"""Reasoning between <think> and </think>: Qwen3, DeepSeek R1 and many others."""

from typing import ClassVar

from octavo.text.reader import AnswerParser, Reading


class ThinkTags(AnswerParser):
    """Parser of reasoning at the beginning of an answer.

    Attributes:
        starts, ends: Texts that begin and end the reasoning.
        begins_inside: Whether the answer begins within the reasoning, because the prompt has its start, or because the
            model always reasons.
    """

    starts: ClassVar[tuple[str, ...]] = ("<think>",)
    ends: ClassVar[tuple[str, ...]] = ("</think>",)
    begins_inside = False

    def parse(self) -> Reading[None]:
        has_start = yield from self.attempt(self._start())
        if not has_start and not self.begins_inside:
            return
        if (yield from self.emit_until(self.reasoning, *self.ends)):
            yield from self.skip_space()

    def _start(self) -> Reading[None]:
        yield from self.skip_space()
        yield from self.expect(*self.starts)
