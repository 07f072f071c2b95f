"""Print text from models, clients and files without letting it control the terminal."""

import sys
import unicodedata
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Controls of text and direction, invisible format characters, and line separators; the two joiners are part of words
# and emoji.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_SAFE = frozenset("\n\t\u200c\u200d")


def printable(text: str, lines: bool = True) -> str:
    """Return `text` with escapes, such as \\x1b or \\u202e, in place of control and direction characters.

    Args:
        lines: Whether to keep newlines and tabs.
    """
    if text.isprintable():  # false for every character that is replaced
        return text
    return "".join(_escape(char) if _is_unsafe(char, lines) else char for char in text)


def write_text(text: str, stream: TextIO | None = None) -> None:
    """Write model output to a stream (stdout by default) and flush it.

    On a terminal, control characters are escaped; elsewhere the text is written unchanged.
    """
    stream = stream or sys.stdout
    stream.write(printable(text) if stream.isatty() else text)
    stream.flush()


def console(stderr: bool = False, soft_wrap: bool = False) -> "Console":
    """Return a console that takes strings literally: no markup, no emoji codes, no highlighting."""
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False)


def _is_unsafe(char: str, lines: bool) -> bool:
    if char in _SAFE:
        return not lines and char in "\n\t"
    return unicodedata.category(char) in _UNSAFE


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()
