"""Phi-4-mini: functools[{"name": ..., "arguments": {...}}, ...], or the array between <|tool_call|> tags."""

from octavo.text.reader import EndOfAnswer, Malformed, Reading

from .json_calls import JsonCalls


class Phi4MiniJson(JsonCalls):
    """Parser of a JSON array of calls after "functools"."""

    def parse(self) -> Reading[None]:
        while marker := (yield from self.emit_until(self.text, "functools", "<|tool_call|>")):
            yield from self.attempt(self._calls(), marker)

    def _calls(self) -> Reading[None]:
        if not (yield from self.lookahead("[")):
            raise EndOfAnswer if self.at_end else Malformed
        yield from self.calls()
        yield from self.closing("<|/tool_call|>")
