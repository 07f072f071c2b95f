"""Llama 3.1 to 3.3: {"name": ..., "parameters": {...}}, at the beginning of the answer or after <|python_tag|>."""

from octavo.text.reader import Reading

from .json_calls import JsonCalls

TAG = "<|python_tag|>"


class Llama3Json(JsonCalls):
    """Parser of an answer that is one call, or several with ";" between them."""

    known_only = True

    def parse(self) -> Reading[None]:
        yield from self.attempt(self._calls())
        while (yield from self.emit_until(self.text, TAG)):
            yield from self.attempt(self._calls(), TAG)

    def _calls(self) -> Reading[None]:
        yield from self.skip_space()
        yield from self.accept(TAG)
        yield from self.calls(";", ",")
