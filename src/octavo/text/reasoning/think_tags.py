"""Reasoning between <think> and </think>: Qwen3, DeepSeek R1 and many others."""

from typing import ClassVar

from octavo.text.reader import Reading

from .parser import ReasoningParser


class ThinkTags(ReasoningParser):
    """Parser of reasoning at the beginning of an answer, between two texts."""

    starts: ClassVar[tuple[str, ...]] = ("<think>",)
    ends: ClassVar[tuple[str, ...]] = ("</think>",)

    def parse(self) -> Reading[None]:
        has_start = yield from self.attempt(self._start())
        if not has_start and not self.begins_inside:
            return
        if (yield from self.emit_until(self.reasoning, *self.ends)):
            yield from self.skip_space()

    def _start(self) -> Reading[None]:
        yield from self.skip_space()
        yield from self.expect(*self.starts)
