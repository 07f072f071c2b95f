"""Parts of octavo enrich: tables, templates, and the columns of schemas."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from octavo.errors import ConfigError
from octavo.server.enrich.answers import Answer, read_answer
from octavo.server.enrich.columns import read_schema, text_column
from octavo.server.enrich.tables import BATCH_ROWS, open_table, open_writer
from octavo.server.enrich.template import Template


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [record for batch in open_table(path).read() for record in batch.to_pylist()]


def test_csv_values_stay_as_they_are(tmp_path: Path) -> None:
    records = [
        {"id": "007", "text": 'a "b", c\nd', "empty": "", "null": "NA"},
        {"id": "1e5", "text": "x" * 300_000, "empty": "", "null": "null"},
    ]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    table = open_table(tmp_path / "t.csv")
    assert table.num_rows == 2 and rows_of(tmp_path / "t.csv") == records
    writer_of_csv = open_writer(tmp_path / "copy.csv", ".csv", table.schema)
    for batch in table.read():
        writer_of_csv.write(batch)
    writer_of_csv.close()
    assert rows_of(tmp_path / "copy.csv") == records


def test_types_of_jsonl(tmp_path: Path) -> None:
    """A column has one type, also if its first values suggest another one, thousands of rows earlier."""
    records: list[dict[str, Any]] = [{"number": 1, "mixed": 1, "object": {"a": 1}, "null": None, "empty": {}}]
    records += [{"number": 2}] * (3 * BATCH_ROWS)
    records += [{"number": 2.5, "mixed": "text", "object": {"b": "x"}, "late": [1, 2], "big": 2**70}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n\n" for record in records))
    table = open_table(tmp_path / "t.jsonl")
    assert table.num_rows == len(records)
    types = {field.name: field.type for field in table.schema}
    assert types["number"] == pa.float64() and types["mixed"] == pa.string() and types["late"] == pa.list_(pa.int64())
    rows = rows_of(tmp_path / "t.jsonl")
    assert rows[0] == {
        "number": 1.0, "mixed": "1", "object": {"a": 1, "b": None}, "null": None, "empty": "{}", "late": None,
        "big": None,
    }  # fmt: skip
    assert rows[-1]["mixed"] == "text" and rows[-1]["big"] == str(2**70) and rows[-1]["object"] == {"a": None, "b": "x"}
    assert [row["number"] for row in rows] == [record["number"] for record in records]
    for format in (".parquet", ".csv", ".jsonl"):
        writer = open_writer(tmp_path / f"copy{format}", format, table.schema)
        for batch in table.read():
            writer.write(batch)
        writer.close()
        assert open_table(tmp_path / f"copy{format}").num_rows == len(records)
    assert rows_of(tmp_path / "copy.parquet") == rows
    assert [json.loads(row["object"]) for row in rows_of(tmp_path / "copy.csv")[:1]] == [{"a": 1, "b": None}]


def test_row_groups_are_large_and_batches_small(tmp_path: Path) -> None:
    table = pa.table({"number": range(200_000)})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    source = open_table(tmp_path / "t.parquet")
    writer = open_writer(tmp_path / "copy.parquet", ".parquet", source.schema)
    for batch in source.read():
        assert batch.num_rows <= BATCH_ROWS
        writer.write(batch)
    writer.close()
    copy = pa.parquet.ParquetFile(tmp_path / "copy.parquet")
    assert copy.metadata.num_row_groups == 4 and copy.read() == table


def test_templates() -> None:
    row = {"a": "x", "b c": 1.5, "n": None, "l": [1], "t": True, "x:y!z": "odd", "0": "zero", "p.q": "dot"}
    given = "{a}{{{b c}}}|{n}|{l}|{t}|{x:y!z}|{0}|{p.q}"
    template = Template(given, row.keys())
    assert template.render(row) == "x{1.5}||[1]|true|odd|zero|dot"
    assert template.columns == ["a", "b c", "n", "l", "t", "x:y!z", "0", "p.q"]
    for wrong in ("{", "}", "{a", "no column", "{unknown}", "{}"):
        with pytest.raises(ConfigError):
            Template(wrong, row.keys())


def test_types_of_properties(tmp_path: Path) -> None:
    definitions = {"Level": {"enum": [1, 2]}, "Loop": {"properties": {"next": {"$ref": "#/$defs/Loop"}}}}
    properties = {
        "text": ({"type": "string"}, pa.string()),
        "maybe": ({"type": ["integer", "null"]}, pa.int64()),
        "optional": ({"anyOf": [{"type": "number"}, {"type": "null"}]}, pa.float64()),
        "either": ({"anyOf": [{"type": "number"}, {"type": "string"}]}, pa.string()),
        "choice": ({"enum": ["a", "b"]}, pa.string()),
        "fixed": ({"const": True}, pa.bool_()),
        "odd": ({"enum": [1, "a"]}, pa.string()),
        "referred": ({"$ref": "#/$defs/Level"}, pa.int64()),
        "endless": ({"$ref": "#/$defs/Loop"}, pa.string()),
        "missing": ({"$ref": "#/$defs/None"}, pa.string()),
        "list": ({"type": "array", "items": {"type": "boolean"}}, pa.list_(pa.bool_())),
        "any list": ({"type": "array"}, pa.string()),
        "object": ({"type": "object", "properties": {"x": {"type": "integer"}}}, pa.struct([("x", pa.int64())])),
        "open": ({"type": "object"}, pa.string()),
        "anything": (True, pa.string()),
    }
    schema = {"$defs": definitions, "properties": {name: each for name, (each, _) in properties.items()}}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    columns = read_schema(tmp_path / "s.json", "error")
    assert {field.name: field.type for field in columns.fields} == {
        name: kind for name, (_, kind) in properties.items()
    }
    assert columns.schema is not None
    assert columns.schema["required"] == list(properties) and columns.schema["additionalProperties"] is False


def test_answers_that_do_not_fit(tmp_path: Path) -> None:
    properties = {"n": {"type": "integer"}, "any": {}, "list": {"type": "array", "items": {"type": "integer"}}}
    (tmp_path / "s.json").write_text(json.dumps({"properties": properties}))
    columns = read_schema(tmp_path / "s.json", "error")
    texts = [
        '{"n": 1, "any": {"a": [1]}, "list": [1, 2]}',
        "{}",
        f'{{"n": {2**70}}}',
        '{"n": "x"}',
        "[1]",
        '{"n": 1',
        "",
    ]
    answers = [Answer(text, is_cut_off=False) for text in texts] + [
        Answer('{"n": 1', True),
        Answer("", False, "refused"),
    ]
    numbers, anything, lists, errors = (array.to_pylist() for array in columns.arrays(answers))
    assert numbers == [1] + [None] * 8 and anything == ['{"a":[1]}'] + [None] * 8 and lists[0] == [1, 2]
    assert errors[:2] == [None, None] and errors[-1] == "refused" and "raise --max-tokens" in errors[-2]
    assert all("does not fit the schema" in error for error in errors[2:-2])


def test_answers_in_results() -> None:
    chat = {"choices": [{"finish_reason": "stop", "message": {"content": "yes", "role": "assistant"}}], "usage": None}
    text = {"choices": [{"finish_reason": "length", "text": "no"}]}
    refused = {"error": {"message": "too long", "code": None}}
    lines = [
        {"id": "1", "custom_id": "1", "response": {"status_code": 200, "body": body}, "error": None}
        for body in (chat, text, refused)
    ]
    lines.append({"id": "1", "custom_id": "1", "response": None, "error": {"code": "x", "message": "line too long"}})
    answers = [read_answer(json.dumps(line).encode()) for line in lines]
    assert answers[:2] == [Answer("yes", False), Answer("no", True)]
    assert [answer.error for answer in answers[2:]] == ["too long", "line too long"]
    arrays = text_column("reply", "error").arrays(answers)
    assert [array.to_pylist() for array in arrays] == [
        ["yes", "no", None, None],
        [None, None, "too long", "line too long"],
    ]
