"""DeepSeek V3 and R1 (a block of JSON after the function's name), and V3.1 (the JSON at once)."""

from octavo.text.reader import AnswerParser, Reading

CALLS, END_OF_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END_OF_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class DeepSeekV3(AnswerParser):
    """Parser of calls between DeepSeek's special tokens."""

    def parse(self) -> Reading[None]:
        while (yield from self.emit_until(self.text, CALLS)):
            yield from self.attempt(self._calls(), CALLS)

    def _calls(self) -> Reading[None]:
        is_last = False
        while not is_last:
            yield from self.skip_space()
            yield from self.expect(CALL)
            name = (yield from self.until(SEPARATOR, longest=256)).strip()
            if name == "function":
                name = (yield from self.until("\n", longest=256)).strip()
                yield from self.skip_space()
                yield from self.expect("```json")
            yield from self.streamed_call(name)
            yield from self.closing("```")
            yield from self.closing(END_OF_CALL)
            self.end_call()
            is_last = yield from self.closing(END_OF_CALLS)
