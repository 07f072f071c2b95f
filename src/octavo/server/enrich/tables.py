"""Read and write tables in CSV, JSONL and Parquet files, a batch of rows at a time."""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from octavo.errors import ConfigError, shortened

BATCH_ROWS = 1024
ROW_GROUP = (65_536, 64 * 2**20)  # rows and bytes of a row group that is written
CSV_BLOCK = 16 * 2**20  # bytes that are parsed together; a longer row cannot be read

Batches = Iterator[pa.RecordBatch]


@dataclass(frozen=True)
class Table:
    """A table in a file.

    Args:
        read: returns the rows from the beginning, in batches of about BATCH_ROWS. Raises ConfigError.
    """

    path: Path
    schema: pa.Schema
    num_rows: int
    read: Callable[[], Batches]


class TableWriter(Protocol):
    """Writes batches of rows to a file."""

    def write(self, batch: pa.RecordBatch) -> None: ...

    def close(self) -> None: ...


def open_table(path: Path) -> Table:
    """Return the table in a file, whose extension names the format. Raises ConfigError.

    CSV and JSONL files are read once for the number of rows and the types. All columns of a CSV file are text, so that
    no value changes.
    """
    check_format(path)
    with _explained(path):
        if path.suffix == ".parquet":
            return _parquet_table(path)
        return _csv_table(path) if path.suffix == ".csv" else _jsonl_table(path)


def open_writer(path: Path, format: str, schema: pa.Schema) -> TableWriter:
    """Return a writer of a new file.

    Args:
        format: a key of WRITERS, whatever the name of the file.
    """
    return WRITERS[format](path, schema)


def check_format(path: Path) -> None:
    """Raise ConfigError unless the extension of a file names a format."""
    if path.suffix not in WRITERS:
        raise ConfigError(f"the name of a table must end in {', '.join(WRITERS)}, unlike {path}")


@contextlib.contextmanager
def _explained(path: Path) -> Generator[None]:
    """Convert errors of reading a file to ConfigError."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else shortened(error)
        raise ConfigError(f"cannot read {path}: {reason}") from None


def _read(path: Path, batches: Callable[[], Iterable[pa.RecordBatch]]) -> Callable[[], Batches]:
    def read() -> Batches:
        with _explained(path):
            yield from batches()

    return read


def _parquet_table(path: Path) -> Table:
    file = pa.parquet.ParquetFile(path)
    read = _read(path, lambda: pa.parquet.ParquetFile(path).iter_batches(BATCH_ROWS))
    return Table(path, file.schema_arrow, file.metadata.num_rows, read)


def _csv_table(path: Path) -> Table:
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    options = pa.csv.ReadOptions(block_size=CSV_BLOCK)
    names = pa.csv.open_csv(path, read_options=options, parse_options=parse).schema.names
    if len(set(names)) < len(names):
        raise ConfigError(f"{path} has two columns of the same name")
    schema = pa.schema([(name, pa.string()) for name in names])
    convert = pa.csv.ConvertOptions(column_types=schema, strings_can_be_null=False)

    def batches() -> Batches:
        reader = pa.csv.open_csv(path, read_options=options, parse_options=parse, convert_options=convert)
        return (part for batch in reader for part in _parts(batch))

    return Table(path, schema, sum(batch.num_rows for batch in batches()), _read(path, batches))


def _parts(batch: pa.RecordBatch) -> Batches:
    """Divide a batch into parts of BATCH_ROWS."""
    return (batch.slice(start, BATCH_ROWS) for start in range(0, batch.num_rows, BATCH_ROWS))


def _jsonl_table(path: Path) -> Table:
    types: dict[str, pa.DataType] = {}
    num_rows = 0
    for records in _records(path):
        num_rows += len(records)
        for name in dict.fromkeys(name for record in records for name in record):
            found = _type_of([record.get(name) for record in records])
            types[name] = _common_type(types[name], found) if name in types else found
    schema = pa.schema([(name, _writable(kind)) for name, kind in types.items()])

    def batches() -> Batches:
        for records in _records(path):
            columns = [_column([record.get(field.name) for record in records], field.type) for field in schema]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)

    return Table(path, schema, num_rows, _read(path, batches))


def _records(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the objects in a JSONL file, BATCH_ROWS at a time. Blank lines are skipped."""
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    with path.open("rb") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        while block := list(itertools.islice(lines, BATCH_ROWS)):
            records = []
            for number, line in block:
                try:
                    records.append(decode(line.removeprefix(b"\xef\xbb\xbf")))
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise ConfigError(f"{path} line {number} is not a JSON object: {error}") from None
            yield records


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError):  # values of different types, or beyond 64 bits
        return pa.string()


def _common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return a type for the values of both; text if there is no other."""
    schemas = [pa.schema([("", one)]), pa.schema([("", other)])]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def _writable(kind: pa.DataType) -> pa.DataType:
    """Return a type that all formats can hold: text for columns of nulls only, and for objects without fields."""
    has_empty = pa.types.is_struct(kind) and kind.num_fields == 0
    return pa.string() if pa.types.is_null(kind) or has_empty else kind


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Return JSON values as an array. Where it is text, other values are encoded as JSON."""
    if pa.types.is_string(kind):
        values = [value if value is None or isinstance(value, str) else json_text(value) for value in values]
    return pa.array(values, kind)


def json_text(value: Any) -> str:
    """Return a value of a table as JSON."""
    return _ENCODER.encode(value).decode()


_ENCODER = msgspec.json.Encoder(enc_hook=str)


class _ParquetWriter:
    """Writes row groups of ROW_GROUP."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._file = pa.parquet.ParquetWriter(path, schema)
        self._batches: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch) -> None:
        self._batches.append(batch)
        rows, size = (sum(getattr(each, name) for each in self._batches) for name in ("num_rows", "nbytes"))
        if rows >= ROW_GROUP[0] or size >= ROW_GROUP[1]:
            self._flush()

    def close(self) -> None:
        if self._batches:
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        self._file.write_table(pa.Table.from_batches(self._batches))
        self._batches = []


class _CsvWriter:
    """Writes CSV; nested values are encoded as JSON."""

    def __init__(self, path: Path, schema: pa.Schema):
        flat = [pa.field(f.name, pa.string() if pa.types.is_nested(f.type) else f.type) for f in schema]
        self._schema = pa.schema(flat)
        self._file = pa.csv.CSVWriter(path, self._schema)

    def write(self, batch: pa.RecordBatch) -> None:
        columns = [
            _column(column.to_pylist(), field.type) if pa.types.is_nested(column.type) else column
            for column, field in zip(batch.columns, self._schema, strict=True)
        ]
        self._file.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def close(self) -> None:
        self._file.close()


class _JsonlWriter:
    """Writes an object per row."""

    def __init__(self, path: Path, _: pa.Schema):
        self._file: BinaryIO = path.open("wb")

    def write(self, batch: pa.RecordBatch) -> None:
        self._file.writelines(_ENCODER.encode(record) + b"\n" for record in batch.to_pylist())

    def close(self) -> None:
        self._file.close()


WRITERS: dict[str, Callable[[Path, pa.Schema], TableWriter]] = {
    ".csv": _CsvWriter,
    ".jsonl": _JsonlWriter,
    ".parquet": _ParquetWriter,
}
"""The formats by their extensions."""
