"""Llama 3.2 and 4: a Python list of calls, such as [get_weather(city="Oslo"), now()]."""

import ast
import json
import warnings

from octavo.text.reader import AnswerParser, Malformed, Reading

START, END = "<|python_start|>", "<|python_end|>"
MAX_LENGTH, MAX_DEPTH = 65_536, 40


class Llama4Pythonic(AnswerParser):
    """Parser of an answer that is a list of calls with literal keyword arguments. Nothing is evaluated."""

    def parse(self) -> Reading[None]:
        yield from self.attempt(self._calls())
        while (yield from self.emit_until(self.text, START)):
            yield from self.attempt(self._calls(), START)

    def _calls(self) -> Reading[None]:
        yield from self.skip_space()
        yield from self.accept(START)
        yield from self.skip_space()
        calls = self._parsed((yield from self._list()))
        for name, arguments in calls:
            self.call(name, arguments)
        yield from self.closing(END)

    def _list(self) -> Reading[str]:
        """Read a bracket and all up to its closing one. Raises Malformed."""
        yield from self.expect("[")
        start, depth, quote = self._at - 1, 1, ""
        while depth:
            while self._at == len(self._buffer):
                yield from self.more()
            character = self._buffer[self._at]
            self._at += 1
            if quote:
                if character == "\\":
                    yield from self._escaped()
                elif character == quote:
                    quote = ""
            elif character in "\"'":
                quote = character
            else:
                depth += (character in "([{") - (character in ")]}")
            if depth > MAX_DEPTH or self._at - start > MAX_LENGTH:
                raise Malformed
        return self._buffer[start : self._at]

    def _escaped(self) -> Reading[None]:
        while self._at == len(self._buffer):
            yield from self.more()
        self._at += 1

    def _parsed(self, text: str) -> list[tuple[str, str]]:
        """Return the names and arguments of calls. Raises Malformed."""
        try:
            with warnings.catch_warnings(action="ignore"):  # of escape sequences that Python does not know
                tree = ast.parse(text, mode="eval").body
            if not isinstance(tree, ast.List) or not tree.elts:
                raise Malformed
            return [self._call_of(node) for node in tree.elts]
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            raise Malformed from None

    def _call_of(self, node: ast.expr) -> tuple[str, str]:
        if not isinstance(node, ast.Call) or node.args or (name := ast.unparse(node.func)) not in self.schemas:
            raise Malformed
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
        if len(arguments) < len(node.keywords):  # a **mapping, or a name given twice
            raise Malformed
        return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)
