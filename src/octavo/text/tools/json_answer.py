"""The format for models that have none of their own: the whole answer is a JSON object, or an array of them."""

from octavo.text.reader import Reading

from .json_calls import JsonCalls


class JsonAnswer(JsonCalls):
    """Parser of an answer that begins with a call or an array of calls, perhaps in a Markdown block of code."""

    known_only = True

    def parse(self) -> Reading[None]:
        yield from self.attempt(self._calls())

    def _calls(self) -> Reading[None]:
        yield from self.skip_space()
        fence = yield from self.accept("```json", "```")
        yield from self.calls(",", ";")
        if fence:
            yield from self.closing("```")
