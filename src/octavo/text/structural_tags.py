"""Structural tags of vLLM and xgrammar as grammars in Lark: free text in which a tag begins a constrained part."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

MAX_FORMATS = 1024  # formats within formats, of which each tag has two
MAX_DEPTH = 32

_EMPTY = '""'
_KINDS: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}


def lark_of(tag: dict[str, Any]) -> str:
    """Return the grammar of a structural tag: {"format": ...}, or {"structures": [...], "triggers": [...]}.

    Raises:
        ValueError: It is malformed.
    """
    rules = _Rules()
    start = rules.expression(_get(tag, "format", dict) if "format" in tag else _format_of_structures(tag))
    return "\n".join([f"start: {start}", *rules.lines, "TEXT: /(.|\\n)*/"])


def enforced(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without llguidance's own options, with which it could turn off its enforcement."""
    return {key: value for key, value in schema.items() if key != "x-guidance"}


def _format_of_structures(tag: dict[str, Any]) -> dict[str, Any]:
    """Return the format that the older fields mean: free text in which a trigger begins one of the structures."""
    structures = [structure if isinstance(structure, dict) else {} for structure in _get(tag, "structures", list)]
    tags = [
        {
            "begin": structure.get("begin"),
            "content": {"type": "json_schema", "json_schema": structure.get("schema", {})},
            "end": structure.get("end", ""),
        }
        for structure in structures
    ]
    return {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}


class _Rules:
    """The rules of a grammar, which are added while formats are converted to expressions."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._formats = self._depth = 0
        self._kinds: dict[str, Callable[[dict[str, Any]], str]] = {
            "const_string": lambda format: _quoted(format, "value"),
            "json_schema": self._json,
            "regex": self._regex,
            "any_text": lambda format: "TEXT",
            "sequence": lambda format: " ".join(map(self.expression, _get(format, "elements", list))),
            "or": lambda format: _either(map(self.expression, _get(format, "elements", list))),
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._separated_tags,
        }

    def expression(self, format: Any) -> str:
        """Return the expression of a format."""
        self._formats += 1
        self._depth += 1
        if self._formats > MAX_FORMATS or self._depth > MAX_DEPTH:
            raise ValueError(f"a structural tag has at most {MAX_FORMATS:,} formats and {MAX_DEPTH} levels of them")
        kind = format.get("type") if isinstance(format, dict) else None
        if not isinstance(kind, str) or kind not in self._kinds:
            raise ValueError(f"a format of a structural tag must have a type, one of {', '.join(self._kinds)}")
        expression = self._kinds[kind](format)
        self._depth -= 1
        return expression

    def _json(self, format: dict[str, Any]) -> str:
        return self._rule(f"%json {json.dumps(enforced(_get(format, 'json_schema', dict)))}")

    def _regex(self, format: dict[str, Any]) -> str:
        pattern = re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", _get(format, "pattern", str))
        return f"/{pattern}/"

    def _tag(self, tag: dict[str, Any]) -> str:
        return f"{_quoted(tag, 'begin')} {self._rest(tag)}"

    def _rest(self, tag: dict[str, Any]) -> str:
        """Return the expression of what follows the beginning of a tag."""
        content, end = _get(tag, "content", dict), tag.get("end", "")
        ends = [_quoted({"end": each}, "end") for each in (end if isinstance(end, list) else [end])]
        if content.get("type") == "any_text" and _EMPTY not in ends:
            return self._rule(f"TEXT {_either(ends)}", "[lazy]")
        return f"{self.expression(content)} {_either(ends)}"

    def _triggered_tags(self, format: dict[str, Any]) -> str:
        """Return the expression of free text in which a trigger must be the beginning of a tag."""
        triggers = [trigger for trigger in _get(format, "triggers", list) if isinstance(trigger, str) and trigger]
        tags = []
        for tag in _tags(format):
            begin = _get(tag, "begin", str)
            trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
            if trigger is None:
                raise ValueError(f"no trigger is the beginning of the tag {begin[:40]!r}")
            reached = self._rule(f"TEXT {json.dumps(trigger)}", "[lazy]")
            tags.append(f"{reached} {json.dumps(begin[len(trigger) :])} {self._rest(tag)}")
        return self._repeated(_either(tags), "", format, after="TEXT")

    def _separated_tags(self, format: dict[str, Any]) -> str:
        tags = _either([self._tag(tag) for tag in _tags(format)])
        return self._repeated(tags, _quoted(format, "separator"), format)

    def _repeated(self, item: str, separator: str, format: dict[str, Any], after: str = "") -> str:
        """Return the expression of any number of items, or as few or many as the format says."""
        once, needed = bool(format.get("stop_after_first")), bool(format.get("at_least_one"))
        repeated = item if once else f"({item} ({separator} {item})*)"
        if once:
            return item if needed else f"({item} | {after or _EMPTY})"
        return f"{repeated}{'' if needed else '?'} {after}"

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"rule_{len(self.lines)}"
        self.lines.append(f"{name}{attributes}: {body}")
        return name


def _tags(format: dict[str, Any]) -> list[dict[str, Any]]:
    tags: list[Any] = _get(format, "tags", list)
    if not tags or not all(isinstance(tag, dict) for tag in tags):
        raise ValueError("tags of a structural tag must be a list of objects")
    return tags


def _either(expressions: Iterable[str]) -> str:
    return f"({' | '.join(expressions)})"


def _quoted(format: dict[str, Any], name: str) -> str:
    return json.dumps(_get(format, name, str), ensure_ascii=False)


def _get(format: dict[str, Any], name: str, kind: type) -> Any:
    value = format.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{name} of a structural tag must be {_KINDS[kind]}")
    return value
