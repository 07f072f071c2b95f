"""The columns that answers become: one of text, or those of a JSON schema, and one for errors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from octavo.errors import ConfigError, shortened

from .answers import Answer
from .tables import json_text

MAX_DEPTH = 16  # of a schema whose values become nested types; deeper values are JSON text

_TYPES: dict[Any, pa.DataType] = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}
Schema = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """The new columns of a table.

    Args:
        fields: the columns of answers, without the one for errors.
        error: the name of the column for errors.
        schema: the JSON schema of answers; None if the answer is the text of the only column.
    """

    fields: Sequence[pa.Field]
    error: str
    schema: Schema | None

    @property
    def all_fields(self) -> list[pa.Field]:
        """Return the columns in the order of the arrays."""
        return [*self.fields, pa.field(self.error, pa.string())]

    def arrays(self, answers: Sequence[Answer]) -> list[pa.Array]:
        """Return the columns of rows. A row with an error has nulls, and the error."""
        cells = [self._cells(answer) for answer in answers]
        columns = [pa.array([row[i] for row, _ in cells], field.type) for i, field in enumerate(self.fields)]
        return [*columns, pa.array([error for _, error in cells], pa.string())]

    def _cells(self, answer: Answer) -> tuple[list[Any], str | None]:
        """Return the values of a row, and what is wrong with its answer."""
        nothing = [None] * len(self.fields)
        if answer.error is not None:
            return nothing, answer.error
        if self.schema is None:
            return [answer.text], None
        try:
            values = json.loads(answer.text)
            return [_cell(values.get(field.name), field.type) for field in self.fields], None
        except (ValueError, AttributeError, RecursionError, OverflowError, pa.ArrowException) as error:
            if answer.is_cut_off:
                return nothing, "the answer was cut off: raise --max-tokens"
            return nothing, f"the answer does not fit the schema: {shortened(error)}"


def text_column(name: str, error: str) -> Columns:
    """Return the columns of answers without a schema."""
    return Columns([pa.field(name, pa.string())], error, None)


def read_schema(path: Path, error: str) -> Columns:
    """Return `columns_of` the JSON schema in a file. Raises ConfigError."""
    try:
        schema = msgspec.json.decode(path.read_bytes())
    except OSError as failure:
        raise ConfigError(f"cannot read {path}: {failure.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise ConfigError(f"{path} is not JSON: {failure}") from None
    return columns_of(str(path), schema, error)


def columns_of(name: str, schema: Any, error: str) -> Columns:
    """Return the columns of answers that match a JSON schema: one for each property.

    All properties are required unless the schema lists those that are. Answers have no others unless it allows them.

    Args:
        name: of the schema, for errors.
        error: the name of the column for errors.

    Raises ConfigError.
    """
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or not properties or schema.get("type", "object") != "object":
        raise ConfigError(
            f'{name} must be the JSON schema of an object, {{"type": "object", "properties": {{...}}}}: each property '
            "becomes a column"
        )
    defaults = {"type": "object", "required": list(properties), "additionalProperties": False}
    fields = [pa.field(name, _arrow_type(each, schema) or pa.string()) for name, each in properties.items()]
    return Columns(fields, error, defaults | schema)


def _arrow_type(schema: Any, root: Schema, depth: int = 0) -> pa.DataType | None:
    """Return the type of the values that match a schema; None if they have no common one, and become JSON text."""
    if depth > MAX_DEPTH or not isinstance(schema, dict):
        return None
    if "$ref" in schema:
        return _arrow_type(_referred(schema["$ref"], root), root, depth + 1)
    for name in ("anyOf", "oneOf", "allOf"):
        if isinstance(parts := schema.get(name), list):
            others = [part for part in parts if part != {"type": "null"}]
            return _arrow_type(others[0], root, depth + 1) if len(others) == 1 else None
    kinds = schema.get("type", [])
    kinds = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "null"]
    if not kinds:
        return _type_of_constants(schema)
    if len(kinds) > 1:
        return None
    if kinds[0] == "array":
        items = _arrow_type(schema.get("items"), root, depth + 1)
        return items and pa.list_(items)
    if kinds[0] == "object":
        return _struct(schema.get("properties"), root, depth)
    return _TYPES.get(kinds[0])


def _struct(properties: Any, root: Schema, depth: int) -> pa.DataType | None:
    if not isinstance(properties, dict) or not properties:
        return None
    fields = [(name, _arrow_type(each, root, depth + 1)) for name, each in properties.items()]
    return None if any(kind is None for _, kind in fields) else pa.struct(fields)


def _type_of_constants(schema: Schema) -> pa.DataType | None:
    """Return the type of an enum or const without a type."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    try:
        kind = pa.array(values).type if isinstance(values, list) else None
    except (pa.ArrowException, OverflowError):
        return None
    return kind if kind in _TYPES.values() else None


def _referred(reference: Any, root: Schema) -> Any:
    """Return the part of a schema that a reference such as #/$defs/Name names."""
    part: Any = root
    for name in str(reference).removeprefix("#").split("/")[1:]:
        part = part.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(part, dict) else None
    return part


def _cell(value: Any, kind: pa.DataType) -> Any:
    """Return a JSON value as one that an array of this type takes. Raises for one that does not fit."""
    if pa.types.is_string(kind) and value is not None and not isinstance(value, str):
        return json_text(value)
    pa.scalar(value, kind)
    return value
