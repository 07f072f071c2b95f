"""JsonScanner: check JSON text that arrives in pieces (RFC 8259)."""

import re

MAX_DEPTH = 200

_SCALAR = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|true|false|null", re.ASCII)
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR_CHARACTERS = frozenset("+-.0123456789eEtrufalsn")
_SPACE = " \t\n\r"


class JsonScanner:
    """Checks one JSON value, character by character.

    Attributes:
        is_complete: Whether the value has ended. A number at the top level never ends by itself.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._open: list[str] = []  # closing brackets that are still to come
        self._expected = "value"
        self._escape = ""  # the part of an escape sequence that has been read, with its backslash
        self._scalar = ""
        self._is_key = False

    def feed(self, text: str, start: int) -> int:
        """Read `text` from `start` on. Return the end of the value, of the text, or of what can begin a value."""
        at = start
        while at < len(text) and not self.is_complete:
            if self._expected == "string":
                after = self._string(text, at)
            elif self._expected == "scalar" and text[at] not in _SCALAR_CHARACTERS:
                if not _SCALAR.fullmatch(self._scalar):
                    return at
                self._end_value()
                continue
            else:
                after = at + self._step(text[at])
            if after == at:
                return at
            at = after
        return at

    def _string(self, text: str, at: int) -> int:
        """Read a part of a string. Return the position after it."""
        character = text[at]
        if self._escape:
            sequence = self._escape + character
            if re.fullmatch(r"\\[\"\\/bfnrt]|\\u[0-9a-fA-F]{4}", sequence):
                self._escape = ""
            elif re.fullmatch(r"\\u[0-9a-fA-F]{0,3}", sequence):
                self._escape = sequence
            else:
                return at
            return at + 1
        if character == "\\":
            self._escape = character
            return at + 1
        if character == '"':
            if self._is_key:
                self._is_key, self._expected = False, "colon"
            else:
                self._end_value()
            return at + 1
        match = _PLAIN.match(text, at)
        assert match is not None
        return match.end()

    def _step(self, character: str) -> bool:
        """Read a character outside of strings. Return whether it is allowed there."""
        expected = self._expected
        if expected == "scalar":
            self._scalar += character
            return len(self._scalar) < 400
        if character in _SPACE:
            return True
        if character == '"' and expected in ("value", "element or end", "key", "key or end"):
            self._is_key = expected.startswith("key")
            self._expected = "string"
        elif expected in ("value", "element or end") and character in "{[":
            self._open.append("}" if character == "{" else "]")
            self._expected = "key or end" if character == "{" else "element or end"
            return len(self._open) <= MAX_DEPTH
        elif expected in ("value", "element or end") and character in _SCALAR_CHARACTERS:
            self._scalar, self._expected = character, "scalar"
        elif expected.endswith("end") and self._open and character == self._open[-1]:
            self._open.pop()
            self._end_value()
        elif expected == "comma or end" and character == ",":
            self._expected = "key" if self._open[-1] == "}" else "value"
        elif expected == "colon" and character == ":":
            self._expected = "value"
        else:
            return False
        return True

    def _end_value(self) -> None:
        self._expected = "comma or end"
        self.is_complete = not self._open
