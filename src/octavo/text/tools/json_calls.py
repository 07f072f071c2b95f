"""Calls written as JSON objects: {"name": ..., "arguments": {...}}, the base of several formats."""

import json

from octavo.text.reader import AnswerParser, Malformed, Reading, loads

ARGUMENTS = ("arguments", "parameters")


class JsonCalls(AnswerParser):
    """Base of parsers of calls that are JSON objects.

    Attributes:
        known_only: Whether an object is a call only if it names a function of the request. For formats without a
            marker, where an answer of JSON would otherwise be taken for a call.
    """

    known_only = False

    def calls(self, *separators: str) -> Reading[None]:
        """Read one call, several calls with separators between them, or a JSON array of calls. Raises Malformed."""
        yield from self.skip_space()
        is_array = yield from self.accept("[")
        while True:
            yield from self.skip_space()
            yield from self.json_call()
            yield from self.skip_space()
            if is_array:
                if (yield from self.expect(",", "]")) == "]":
                    return
            elif not separators or not (yield from self.accept(*separators)):
                return

    def json_call(self) -> Reading[None]:
        """Read one call. Its arguments are emitted while they are read, if its name comes first. Raises Malformed."""
        yield from self.expect("{")
        name, arguments, has_started = "", "{}", False
        while True:
            key = yield from self._key()
            if key in ARGUMENTS and has_started:
                raise Malformed
            if key in ARGUMENTS and name and (yield from self.lookahead("{")):
                has_started = True
                yield from self.streamed_call(name)
            elif key in ARGUMENTS:
                arguments = yield from self.json_value()
            else:
                value = yield from self.json_value()
                if key == "name" and not has_started:
                    name = self._checked(value)
            yield from self.skip_space()
            if (yield from self.expect(",", "}")) == "}":
                break
        if has_started:
            self.end_call()
        else:
            self._checked(json.dumps(name))
            text = loads(arguments) if arguments.startswith('"') else arguments  # JSON within a string
            self.call(name, "{}" if text == "null" else text)

    def _key(self) -> Reading[str]:
        yield from self.skip_space()
        if not (yield from self.lookahead('"')):
            raise Malformed
        key: str = loads((yield from self.json_value()))
        yield from self.skip_space()
        yield from self.expect(":")
        yield from self.skip_space()
        return key

    def _checked(self, text: str) -> str:
        """Return the name of a function, which is JSON text. Raises Malformed."""
        name = loads(text)
        if not isinstance(name, str) or not name or (self.known_only and name not in self.schemas):
            raise Malformed
        return name
