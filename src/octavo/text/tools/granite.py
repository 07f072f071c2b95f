"""Granite 3: <|tool_call|>[{"name": ..., "arguments": {...}}, ...]; some versions write <tool_call>."""

from octavo.text.reader import Reading

from .json_calls import JsonCalls


class Granite(JsonCalls):
    """Parser of a JSON array of calls after <|tool_call|>."""

    def parse(self) -> Reading[None]:
        while marker := (yield from self.emit_until(self.text, "<|tool_call|>", "<tool_call>")):
            yield from self.attempt(self._calls(), marker)

    def _calls(self) -> Reading[None]:
        yield from self.calls()
        yield from self.closing("</tool_call>", "<|/tool_call|>")
