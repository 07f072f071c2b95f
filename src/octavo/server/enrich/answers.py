"""The answers in the results of a batch."""

from dataclasses import dataclass

import msgspec

CUT_OFF = "length"


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a row's prompt, or why there is none."""

    text: str
    is_cut_off: bool
    error: str | None = None


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    message: _Message | None = None
    text: str | None = None


class _Error(msgspec.Struct):
    message: str


class _Body(msgspec.Struct):
    choices: list[_Choice] = []
    error: _Error | None = None


class _Response(msgspec.Struct):
    body: _Body


class _Line(msgspec.Struct):
    response: _Response | None
    error: _Error | None = None


_LINE = msgspec.json.Decoder(_Line)


def read_answer(line: bytes) -> Answer:
    """Return the answer in a result of a chat or a completion."""
    result = _LINE.decode(line)
    body = result.response.body if result.response else _Body()
    if error := result.error or body.error:
        return Answer("", False, error.message)
    [choice] = body.choices
    text = choice.text if choice.message is None else choice.message.content
    return Answer(text or "", choice.finish_reason == CUT_OFF)
