"""Template: the prompt of a row, as text with the names of columns in braces."""

import string
from collections.abc import Collection, Mapping
from typing import Any

from octavo.errors import ConfigError, shortened

from .tables import json_text


class Template:
    """A text such as `Sentiment of: {text}`. `{{` and `}}` stand for braces.

    Args:
        columns: the names of the table's columns.

    Raises ConfigError if the text names other columns, or none.
    """

    def __init__(self, text: str, columns: Collection[str]):
        try:
            self._parts = [_part(*parsed) for parsed in string.Formatter().parse(text)]
        except ValueError as error:
            message = f"the prompt is malformed ({error}): write {{column}}, and {{{{ or }}}} for a brace itself"
            raise ConfigError(message) from None
        self.columns = list(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.columns:
            example = next(iter(columns), "text")
            raise ConfigError(f"the prompt names no column: write {{{example}}} where the text of a column belongs")
        for name in self.columns:
            if name not in columns:
                known = shortened(", ".join(columns))
                raise ConfigError(f"the prompt names the column {name!r}, which the table does not have: {known}")

    def render(self, row: Mapping[str, Any]) -> str:
        """Return the prompt of a row. A null becomes an empty text, a nested value JSON."""
        return "".join(text + (_text(row[name]) if name is not None else "") for text, name in self._parts)


def _part(text: str, name: str | None, format: str | None, conversion: str | None) -> tuple[str, str | None]:
    """Return text and the name of the column after it, which may contain `:` and `!`."""
    if name is not None:
        name += f"!{conversion}" if conversion else ""
        name += f":{format}" if format else ""
    return text, name


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return json_text(value) if isinstance(value, (bool, list, dict)) else str(value)
