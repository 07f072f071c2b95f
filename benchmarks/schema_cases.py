"""SCHEMAS: JSON schemas of all kinds that structured output supports, on which it is tested and measured.

Their outputs are bounded, so that a model at a high temperature does not ramble on until max_tokens: strings by
maxLength, a pattern or a format, arrays by maxItems, properties by names, and the digits of a fraction by multipleOf
(without it, a small model may repeat a digit for ever). Only recursive schemas may go on, and a random choice ends
them soon.
"""

from typing import Any

STRING, INTEGER, BOOLEAN, NULL = ({"type": kind} for kind in ("string", "integer", "boolean", "null"))


def record(required: int | None = None, **properties: Any) -> dict[str, Any]:
    """Return an object of these properties, the first `required` of which are required; by default all."""
    names = list(properties)[:required]
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def several(item: Any, least: int, most: int) -> dict[str, Any]:
    """Return an array of `least` to `most` items."""
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def matching(pattern: str) -> dict[str, Any]:
    """Return a string that a regular expression matches as a whole."""
    return {"type": "string", "pattern": f"^({pattern})$"}


SHORT = {"type": "string", "maxLength": 8}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
COLOR = {"enum": ["red", "green", "blue"]}
POINT = record(x=DIGIT, y=DIGIT)
TREE = {
    "$defs": {"node": record(1, value=DIGIT, next={"anyOf": [{"$ref": "#/$defs/node"}, NULL]})},
    "$ref": "#/$defs/node",
}
LINKED = {"definitions": {"name": matching("[a-z]{1,5}")}, **record(
    first={"$ref": "#/definitions/name"}, second={"$ref": "#/definitions/name"}
)}  # fmt: skip
EXPRESSION = {
    "$defs": {
        "expression": {"anyOf": [DIGIT, {"$ref": "#/$defs/sum"}]},
        "sum": record(left=DIGIT, right={"$ref": "#/$defs/expression"}),
    },
    "$ref": "#/$defs/expression",
}
PERSON = record(
    3, name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 120}, email=matching("[a-z]{1,6}@[a-z]{1,6}\\.org"),
    tags=several(COLOR, 0, 2), address=record(street=SHORT, number=DIGIT),
)  # fmt: skip
PATTERNS = [
    "[a-z]{2,6}", "[A-Z]{3}-[0-9]{4}", "(ab|cd){1,3}", "x{1,5}y{2}", "\\d{4}", "[äöü]{1,3}", "(a|b)?c", '[^"\\\\]{1,3}',
    "\\w{1,4}", "[Yy]es|[Nn]o", "[日本語]{2}", "\\+\\d{2} \\d{3,6}",
]  # fmt: skip
FORMATS = ["date", "ipv4", "ipv6", "uuid"]  # of a bounded length

SCHEMAS: list[dict[str, Any]] = [
    BOOLEAN,
    NULL,
    DIGIT,
    SHORT,
    COLOR,
    POINT,
    TREE,
    LINKED,
    EXPRESSION,
    PERSON,
    {"type": "integer", "minimum": -5, "maximum": 500},
    {"type": "integer", "exclusiveMinimum": 0, "maximum": 7},
    {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 7},
    {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"const": "fixed"},
    {"const": 3},
    {"const": [1, "a", None]},
    {"const": {"a": 1}},
    {"enum": [1, 2, "three", None, True]},
    {"enum": ["é", "日本", "🙂", '"', "\\", "\n"]},
    {"enum": [[1], {"a": "b"}, -0.5]},
    {"type": ["boolean", "null"]},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
    *[matching(pattern) for pattern in PATTERNS],
    *[{"type": "string", "format": name} for name in FORMATS],
    *[{"type": "string", "format": name, "maxLength": 20} for name in ("email", "hostname", "uri")],
    *[{"type": "string", "format": name, "maxLength": 35} for name in ("time", "date-time", "duration")],
    *[several(item, low, high) for item in (DIGIT, COLOR, BOOLEAN, SHORT, POINT) for low, high in ((0, 2), (2, 3))],
    several(several(DIGIT, 1, 2), 1, 2),
    several({"anyOf": [DIGIT, COLOR]}, 1, 4),
    {"type": "array", "prefixItems": [DIGIT, COLOR], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [DIGIT], "items": COLOR, "minItems": 1, "maxItems": 3},
    record(0, a=DIGIT, b=COLOR),
    record(1, a=DIGIT, b=COLOR),
    record(name=SHORT, age=DIGIT),
    record(ünïcode=DIGIT),
    record(**{"a b": DIGIT, 'c"d': BOOLEAN}),
    record(inner=record(deeper=record(deepest=DIGIT))),
    record(points=several(POINT, 1, 2), color=COLOR),
    record(kind={"const": "a"}, value={"anyOf": [DIGIT, NULL]}),
    record(a=DIGIT, b=BOOLEAN, c=NULL, d=COLOR, e=SHORT),
    record(0, a=POINT, b=POINT, c=POINT),
    record(date={"type": "string", "format": "date"}, id=matching("[A-F0-9]{4}")),
    {"anyOf": [DIGIT, COLOR]},
    {"anyOf": [POINT, several(DIGIT, 0, 2)]},
    {"anyOf": [record(a=DIGIT), record(b=COLOR)]},
    {"oneOf": [{"const": "a"}, {"const": "b"}]},
    {"oneOf": [record(kind={"const": "circle"}, r=DIGIT), record(kind={"const": "box"}, side=DIGIT)]},
    {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 12}]},
    {
        "allOf": [{"type": "object", "properties": {"a": DIGIT}, "required": ["a"]}],
        "additionalProperties": False,
        "properties": {"a": True},
    },
    {
        "type": "object",
        "properties": {"a": DIGIT},
        "required": ["a"],
        "patternProperties": {"^[b-z]{1,4}$": BOOLEAN},
        "additionalProperties": False,
        "maxProperties": 3,
    },
]
