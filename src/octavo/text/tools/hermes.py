"""Hermes 2 and 3, Qwen 2.5 and 3: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from octavo.text.reader import Reading

from .json_calls import JsonCalls


class Hermes(JsonCalls):
    """Parser of calls between <tool_call> and </tool_call>."""

    def parse(self) -> Reading[None]:
        while (yield from self.emit_until(self.text, "<tool_call>")):
            yield from self.attempt(self._call(), "<tool_call>")

    def _call(self) -> Reading[None]:
        yield from self.calls()
        yield from self.closing("</tool_call>")
