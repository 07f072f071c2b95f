"""An answer that a grammar forces to be the arguments of one function."""

from octavo.text.reader import AnswerParser, Reading


class Forced(AnswerParser):
    """Parser of an answer that is the arguments of the only function in `schemas`."""

    def parse(self) -> Reading[None]:
        yield from self.attempt(self._call())

    def _call(self) -> Reading[None]:
        yield from self.streamed_call(next(iter(self.schemas)))
        self.end_call()
