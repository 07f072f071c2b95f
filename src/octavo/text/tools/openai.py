"""gpt-oss's harmony format: messages on the channels analysis (reasoning), commentary (calls) and final (text).

https://cookbook.openai.com/articles/openai-harmony
"""

import re

from octavo.text.reader import AnswerParser, Malformed, Reading

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")

_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")


class Harmony(AnswerParser):
    """Parser of reasoning, calls and text in one.

    Attributes:
        with_calls: Whether messages to functions become calls; otherwise they come back as text.
    """

    with_calls = True

    def parse(self) -> Reading[None]:
        self._channel = ""
        yield from self.attempt(self._without_start())
        if self._channel:
            yield from self._message()
        while marker := (yield from self.emit_until(self.text, CHANNEL, START)):
            if (yield from self.attempt(self._header(marker), marker)):
                yield from self._message()

    def _without_start(self) -> Reading[None]:
        """Read a header whose beginning is in the prompt: the recipient comes first."""
        yield from self.expect(" to=")
        yield from self._header(" to=")

    def _header(self, marker: str) -> Reading[None]:
        """Read a header, and the whole message if that is a call. Raises Malformed."""
        header = marker + (yield from self.until(MESSAGE, longest=400))
        channel = re.search(r"<\|channel\|>\s*(\w+)", header)
        if channel is None:
            raise Malformed
        self._channel = channel[1]
        if recipient := _RECIPIENT.search(header):
            if not self.with_calls:
                raise Malformed
            yield from self.streamed_call(recipient[1])
            self.end_call()
            yield from self.closing(*ENDS)
            self._channel = ""

    def _message(self) -> Reading[None]:
        if self._channel:
            emit = self.reasoning if self._channel == "analysis" else self.text
            yield from self.emit_until(emit, *ENDS)
        self._channel = ""
