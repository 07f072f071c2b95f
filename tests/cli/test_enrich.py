"""octavo enrich as a user runs it, on tables of every format; killed and continued."""

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet
import pytest

from command_line import OCTAVO, Terminal, complaint, octavo
from octavo import LLM, SamplingParams
from octavo.cli import _app
from octavo.errors import ConfigError

TEXTS = ["good", 'so "so", really', "bad\nvery bad", "", "日本語 🙂"]
RECORDS = [{"id": number, "text": text, "price": number / 4} for number, text in enumerate(TEXTS)]
PROMPT = "Sentiment of: {text} ({id})"
SCHEMA = {
    "type": "object",
    "properties": {
        "sentiment": {"enum": ["positive", "negative"]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        "sure": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return list(pa.parquet.read_table(path).to_pylist())
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(model: Path, table: Path, output: Path, *more: str) -> list[str]:
    flags = ["--model", str(model), "--threads", "1", "--max-batch-size", "8", "--max-tokens", "8"]
    return ["enrich", str(table), "--prompt", PROMPT, "--output", str(output), *flags, *more]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> Iterator[list[str]]:
    """The answers of the Python API."""
    params = SamplingParams(temperature=0, max_tokens=8)
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Sentiment of: {text} ({number})"}]
        for number, text in enumerate(TEXTS)
    ]
    with LLM(str(tiny_llama)) as llm:
        yield [output.text for output in llm.chat(chats, params)]


@pytest.mark.parametrize("source, target", [("csv", "parquet"), ("jsonl", "csv"), ("parquet", "jsonl")])
def test_answers_become_a_column(
    tmp_path: Path, tiny_llama: Path, expected: list[str], source: str, target: str
) -> None:
    table, output = write(tmp_path / f"in.{source}", RECORDS), tmp_path / f"out.{target}"
    done = octavo(*command(tiny_llama, table, output, "--system", "Be brief.", "--column", "reply"))
    assert done.returncode == 0 and "5 rows answered, 0 failed" in done.stderr, done
    rows = read(output)
    assert [row["reply"] for row in rows] == expected
    assert list(rows[0]) == ["id", "text", "price", "reply", "error"]
    assert [str(row["text"]) for row in rows] == TEXTS
    assert [float(row["price"]) for row in rows] == [record["price"] for record in RECORDS]
    assert all(not row["error"] for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([table.name, output.name])


def test_properties_become_columns(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    table = write(tmp_path / "in.parquet", RECORDS)
    flags = ("--schema", str(tmp_path / "schema.json"), "--max-tokens", "200", "--temperature", "1", "--seed", "5")
    done = octavo(*command(tiny_llama, table, tmp_path / "out.parquet", *flags))
    assert done.returncode == 0, done
    schema = pa.parquet.read_schema(tmp_path / "out.parquet")
    types = {"sentiment": pa.string(), "stars": pa.int64(), "sure": pa.bool_(), "tags": pa.list_(pa.string())}
    assert {name: schema.field(name).type for name in types} == types
    assert schema.field("id").type == pa.int64() and schema.field("error").type == pa.string()
    for row in read(tmp_path / "out.parquet"):
        assert row["error"] is None
        jsonschema.validate({name: row[name] for name in types}, SCHEMA)


def test_rows_that_fail(tmp_path: Path, tiny_llama: Path) -> None:
    """A prompt beyond the context, and answers that the limit of tokens cuts off."""
    (tmp_path / "schema.json").write_text(json.dumps({"properties": {"long": {"type": "string", "minLength": 90}}}))
    table = write(tmp_path / "in.jsonl", [{"id": 1, "text": "x " * 2000}, {"id": 2}])
    done = octavo(*command(tiny_llama, table, tmp_path / "plain.jsonl"))
    assert done.returncode == 0 and "1 rows answered, 1 failed" in done.stderr
    first, second = read(tmp_path / "plain.jsonl")
    assert first["answer"] is None and "context" in first["error"]
    assert second["answer"] and second["error"] is None and second["text"] is None
    flags = ("--schema", str(tmp_path / "schema.json"))
    done = octavo(*command(tiny_llama, table, tmp_path / "cut.jsonl", *flags))
    assert done.returncode == 0 and "1 answers do not fit the schema" in done.stderr
    first, second = read(tmp_path / "cut.jsonl")
    assert "context" in first["error"] and "raise --max-tokens" in second["error"] and second["long"] is None


def test_kill_and_continue(tmp_path: Path, tiny_llama: Path) -> None:
    records = [{"id": number, "text": f"Text {number}"} for number in range(300)]
    table, output = write(tmp_path / "in.csv", records), tmp_path / "out.parquet"
    answers = tmp_path / "out.parquet.answers.jsonl"
    flags = ("--max-tokens", "24", "--ignore-eos")
    assert octavo(*command(tiny_llama, table, tmp_path / "whole.parquet", *flags)).returncode == 0
    process = subprocess.Popen([*OCTAVO, *command(tiny_llama, table, output, *flags)], start_new_session=True)
    deadline = time.monotonic() + 60
    while not answers.exists() or answers.read_bytes().count(b"\n") < 50:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert answers.exists() and not output.exists()
    other = complaint(*command(tiny_llama, table, output, *flags, "--system", "Other instructions"))
    assert "another table, prompt, schema or options" in other and "delete it" in other
    done = octavo(*command(tiny_llama, table, output, *flags))
    assert done.returncode == 0 and "continuing after" in done.stderr
    assert pa.parquet.read_table(output) == pa.parquet.read_table(tmp_path / "whole.parquet")
    assert not answers.exists()


def test_what_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    table, out = write(tmp_path / "in.csv", RECORDS), str(tmp_path / "out.csv")

    def refused(*flags: str, table: Path = table, output: str = out, prompt: str = "{text}") -> str:
        arguments = ["enrich", str(table), "--prompt", prompt, "--output", output, "--model", "none", *flags]
        with pytest.raises(ConfigError) as error:  # in this process, since a process each would take long
            _app(["enrich"])(arguments, prog_name="octavo", standalone_mode=False)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "names no column" in complaint("enrich", str(table), "--prompt", "x", "--output", out)
    assert "the column 'txt', which the table does not have: id, text, price" in refused(prompt="{txt}")
    assert "the prompt names no column: write {id}" in refused(prompt="Sentiment?")
    assert "a brace itself" in refused(prompt='{"text": {text}}}')
    assert "must end in .csv, .jsonl, .parquet" in refused(output=str(tmp_path / "out.xlsx"))
    assert "must end in" in refused(table=tmp_path / "in.txt")
    assert "cannot read" in refused(table=tmp_path / "none.csv")
    assert "exists: delete it" in refused(output=str(table))
    assert "two columns 'price'" in refused("--column", "price")
    assert "two columns 'id'" in refused("--error-column", "id")
    for number, content in enumerate(("{", "[]", '{"type": "array"}', '{"properties": {}}')):
        (tmp_path / f"{number}.json").write_text(content)
        assert f"{number}.json " in refused("--schema", str(tmp_path / f"{number}.json"))
    assert "cannot read" in refused("--schema", str(tmp_path / "none.json"))
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n[]\n')
    assert "line 2 is not a JSON object" in refused(table=tmp_path / "in.jsonl")
    (tmp_path / "in.parquet").write_text("no table")
    assert "cannot read" in refused(table=tmp_path / "in.parquet")
    (tmp_path / "evil.json").write_text(json.dumps({"properties": {"a": {"pattern": "(", "type": "string"}}}))
    assert not (tmp_path / "out.csv").exists()
    done = octavo(*command(tiny_llama, table, tmp_path / "out.csv", "--schema", str(tmp_path / "evil.json")))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done


def test_progress_on_a_terminal(tmp_path: Path, tiny_llama: Path) -> None:
    table = write(tmp_path / "in.csv", [{"id": number, "text": "x"} for number in range(64)])
    flags = ("--max-tokens", "200", "--ignore-eos")
    terminal = Terminal(*command(tiny_llama, table, tmp_path / "out.csv", *flags))
    terminal.wait_for(r"rows/s, \d+ tokens/s")
    terminal.close()
