"""Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}], and since v11 [TOOL_CALLS]name[ARGS]{...}."""

import secrets
import string

from octavo.text.reader import Reading

from .json_calls import JsonCalls

MARKER = "[TOOL_CALLS]"


class Mistral(JsonCalls):
    """Parser of calls after [TOOL_CALLS], in both formats."""

    def parse(self) -> Reading[None]:
        while (yield from self.emit_until(self.text, MARKER)):
            yield from self.attempt(self._calls(), MARKER)

    def _calls(self) -> Reading[None]:
        yield from self.skip_space()
        if (yield from self.lookahead("[", "{")):
            yield from self.calls()
            return
        name = yield from self.word()
        if (yield from self.accept("[CALL_ID]")):
            yield from self.word()
        yield from self.accept("[ARGS]")
        yield from self.streamed_call(name)
        self.end_call()

    def new_id(self) -> str:
        """Return nine letters and digits, as Mistral's templates require."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
