"""Qwen3-Coder: <tool_call><function=name><parameter=key>value</parameter></function></tool_call>."""

import json
from typing import Any

from octavo.text.reader import AnswerParser, Malformed, Reading

FUNCTION, END_OF_FUNCTION = "<function=", "</function>"
PARAMETER, END_OF_PARAMETER = "<parameter=", "</parameter>"


class Qwen3Xml(AnswerParser):
    """Parser of calls in XML. Their arguments become JSON by the types in the function's schema."""

    def parse(self) -> Reading[None]:
        while marker := (yield from self.emit_until(self.text, "<tool_call>", FUNCTION)):
            yield from self.attempt(self._call(marker), marker)

    def _call(self, marker: str) -> Reading[None]:
        if marker != FUNCTION:
            yield from self.skip_space()
            yield from self.expect(FUNCTION)
        name = (yield from self.until(">", longest=256)).strip()
        if not name:
            raise Malformed
        schema = self.schemas.get(name)
        types = schema.get("properties") if isinstance(schema, dict) else None
        self.start_call(name)
        opening = "{"
        while True:
            yield from self.skip_space()
            if (yield from self.expect(PARAMETER, END_OF_FUNCTION)) == END_OF_FUNCTION:
                break
            key = (yield from self.until(">", longest=256)).strip()
            text = (yield from self.until(END_OF_PARAMETER)).removeprefix("\n").removesuffix("\n")
            value = _typed(text, types.get(key) if isinstance(types, dict) else None)
            self.arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: {value}")
            opening = ", "
        self.arguments("{}" if opening == "{" else "}")
        self.end_call()
        yield from self.closing("</tool_call>")


def _typed(text: str, schema: Any) -> str:
    """Return a value as JSON: a string, or what the text is in JSON if the schema does not say that it is a string."""
    kinds = schema.get("type") if isinstance(schema, dict) else None
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "string" not in kinds:
        try:
            value = json.loads(text if text not in ("True", "False", "None") else _PYTHON[text])
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, RecursionError):
            pass
    elif "null" in kinds and text in ("null", "None"):
        return "null"
    return json.dumps(text, ensure_ascii=False)


_PYTHON = {"True": "true", "False": "false", "None": "null"}
