"""enrich: answer a prompt for each row of a Ray Dataset, on a cluster, as `octavo enrich` does on one machine."""

import hashlib
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import ray.data
from pyarrow import fs

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.llm import LLM
from octavo.params import SamplingParams, StructuredOutputs
from octavo.server.enrich.answers import CUT_OFF, Answer
from octavo.server.enrich.columns import Columns, columns_of, text_column
from octavo.server.enrich.template import Template

from .resources import engine_options

BATCH_ROWS = 256  # that an engine has at a time
WHITESPACE = " ?"  # between the parts of JSON; small models may fill their answers with more
UNFINISHED = "."  # files whose names begin so are no part of the result


def enrich(
    dataset: ray.data.Dataset,
    output: str,
    prompt: str,
    *,
    id_column: str,
    model: str | Mapping[str, Any] = "smollm2",
    schema: Mapping[str, Any] | None = None,
    system: str | None = None,
    engines: int | tuple[int, int] = 1,
    column: str = "answer",
    error_column: str = "error",
    sampling: Mapping[str, Any] | None = None,
    batch_rows: int = BATCH_ROWS,
) -> int:
    """Write the dataset with the answers in new columns, as Parquet files. Each row is written once.

    If this is interrupted, the same call goes on: rows that were written are not computed again. The rows of a lost
    node are computed on another one.

    Args:
        dataset: with rows that do not change from one reading to the next.
        output: the folder of the result, on a file system that all nodes share, or in an object store. It has a file
            for each batch, in no order.
        prompt: with the names of columns in braces, as in `octavo enrich`.
        id_column: the column that identifies a row; no two rows have the same value.
        model: its name, or the settings of an LLM.
        schema: a JSON schema of an object, whose properties become columns; without one, the answer is text.
        engines: number of engines, or the least and the greatest. Each takes as many CPUs as it has `threads`, or one.
            Ray needs a CPU more to read the dataset.
        sampling: fields of SamplingParams; by default 256 tokens at temperature 0.
        batch_rows: rows of a file, which an engine has at a time. So many may be computed again after an interruption.

    Returns:
        The number of rows that this call answered.

    Raises:
        ConfigError: A setting is wrong, or the folder has files of another table.
    """
    settings: dict[str, Any] = {"model": model} if isinstance(model, str) else dict(model)
    names = dataset.schema().names
    template = Template(prompt, names)
    columns = text_column(column, error_column) if schema is None else columns_of("schema", dict(schema), error_column)
    if id_column not in names:
        raise ConfigError(f"the dataset has no column {id_column!r} (id_column); it has {', '.join(names)}")
    if taken := {field.name for field in columns.all_fields} & set(names):
        raise ConfigError(f"the dataset already has a column {min(taken)!r}: choose other names for the new ones")
    params = {"temperature": 0.0, "max_tokens": 256} | dict(sampling or {})
    written = _written_ids(output, id_column, [*names, *(field.name for field in columns.all_fields)])
    if len(written):
        without = partial(_without, id_column=id_column, written=written)
        dataset = dataset.map_batches(without, batch_size=None, batch_format="pyarrow")
    least, most = (engines, engines) if isinstance(engines, int) else engines
    counts = dataset.repartition(target_num_rows_per_block=batch_rows).map_batches(
        _Enricher,
        fn_constructor_args=(settings, template, columns, system, params, output, id_column),
        batch_size=batch_rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
        **engine_options(EngineConfig.from_keywords(**settings)),
    )
    rows: int = sum(count["rows"] for count in counts.iter_rows())
    _remove_unfinished(output)
    return rows


def _written_ids(output: str, id_column: str, names: list[str]) -> pa.Array:
    """Return the ids of the rows that earlier calls wrote."""
    system, folder = fs.FileSystem.from_uri(_uri(output))
    system.create_dir(folder, recursive=True)
    table = pyarrow.dataset.dataset(folder, filesystem=system, format="parquet")
    if not table.files:
        return pa.array([])
    if table.schema.names != names:
        raise ConfigError(f"{output} has files with the columns {', '.join(table.schema.names)}: name another folder")
    return table.to_table(columns=[id_column]).column(id_column).combine_chunks()


def _without(batch: pa.Table, id_column: str, written: pa.Array) -> pa.Table:
    """Return the rows that are still to be written."""
    return batch.filter(pc.invert(pc.is_in(batch.column(id_column), value_set=written)))


def _remove_unfinished(output: str) -> None:
    system, folder = fs.FileSystem.from_uri(_uri(output))
    for file in system.get_file_info(fs.FileSelector(folder)):
        if file.base_name.startswith(UNFINISHED):
            system.delete_file(file.path)


def _uri(output: str) -> str:
    return output if "://" in output else str(Path(output).resolve())


class _Enricher:
    """One engine, which writes the batches that it is given with their answers.

    A batch's file is named after its rows and appears at once as a whole. So a batch that is computed again, because
    Ray lost the report of it, is not written twice.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        template: Template,
        columns: Columns,
        system: str | None,
        params: dict[str, Any],
        output: str,
        id_column: str,
    ):
        self._llm, self._template, self._columns = LLM(**settings), template, columns
        form = StructuredOutputs(json=columns.schema, whitespace_pattern=WHITESPACE) if columns.schema else None
        self._params = SamplingParams(**params, structured_outputs=form)
        self._before = [] if system is None else [{"role": "system", "content": system}]
        self._files, self._folder = fs.FileSystem.from_uri(_uri(output))
        self._id_column = id_column

    def __call__(self, batch: pa.Table) -> pa.Table:
        ids = batch.column(self._id_column).to_pylist()
        name = f"{hashlib.sha256(repr(ids).encode()).hexdigest()[:32]}.parquet"
        if ids and self._files.get_file_info(f"{self._folder}/{name}").type == fs.FileType.NotFound:
            self._write(self._with_answers(batch), name)
        return pa.table({"rows": [len(ids)]})

    def _write(self, table: pa.Table, name: str) -> None:
        unfinished = f"{self._folder}/{UNFINISHED}{uuid.uuid4().hex}"
        pq.write_table(table, unfinished, filesystem=self._files)
        self._files.move(unfinished, f"{self._folder}/{name}")

    def _with_answers(self, batch: pa.Table) -> pa.Table:
        texts = [self._template.render(record) for record in batch.select(self._template.columns).to_pylist()]
        if self._llm.tokenizer.has_chat_template:
            prompts: list[Any] = [[*self._before, {"role": "user", "content": text}] for text in texts]
        else:
            prompts = texts
        answers = []
        for output in self._llm.generate_iter(prompts, self._params):
            error = None if output.error is None else str(output.error)
            answers.append(Answer(output.text, output.outputs[0].finish_reason == CUT_OFF, error))
        for field, values in zip(self._columns.all_fields, self._columns.arrays(answers), strict=True):
            batch = batch.append_column(field, values)
        return batch
