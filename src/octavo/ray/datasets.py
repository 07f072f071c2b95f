"""enrich: answer a prompt for each row of a Ray Dataset, on a cluster, as `octavo enrich` does on one machine."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.checkpoint import CheckpointConfig

from octavo.errors import ConfigError
from octavo.llm import LLM
from octavo.params import SamplingParams, StructuredOutputs
from octavo.server.enrich.answers import CUT_OFF, Answer
from octavo.server.enrich.columns import Columns, columns_of, text_column
from octavo.server.enrich.template import Template

BATCH_ROWS = 256  # that an engine has at a time
WHITESPACE = " ?"  # between the parts of JSON; small models may fill their answers with more


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
) -> None:
    """Write the dataset with the answers in new columns, as Parquet files. Each row is written once.

    If this is interrupted, the same call goes on: rows that were written are not computed again. The rows of a lost
    node are computed on another one.

    Args:
        dataset: as read from files, such as by ray.data.read_parquet.
        output: the folder of the result, on a file system that all nodes share, or in an object store. Beside it,
            OUTPUT.done has the ids of the rows that were written, until all are.
        prompt: with the names of columns in braces, as in `octavo enrich`.
        id_column: the column that identifies a row.
        model: its name, or the settings of an LLM.
        schema: a JSON schema of an object, whose properties become columns; without one, the answer is text.
        engines: number of engines, or the least and the greatest. Each takes as many CPUs as it has `threads`, or one.
        sampling: fields of SamplingParams; by default 256 tokens at temperature 0.
        batch_rows: rows that an engine has at a time, and the rows that are computed again after a node is lost.

    Raises:
        ConfigError: A setting is wrong.
    """
    settings = {"model": model} if isinstance(model, str) else dict(model)
    names = dataset.schema().names
    template = Template(prompt, names)
    columns = text_column(column, error_column) if schema is None else columns_of("schema", dict(schema), error_column)
    if id_column not in names:
        raise ConfigError(f"the dataset has no column {id_column!r} (id_column); it has {', '.join(names)}")
    if taken := {field.name for field in columns.all_fields} & set(names):
        raise ConfigError(f"the dataset already has a column {min(taken)!r}: choose other names for the new ones")
    params = {"temperature": 0.0, "max_tokens": 256} | dict(sampling or {})
    dataset.context.checkpoint_config = CheckpointConfig(id_column, f"{output.rstrip('/')}.done")
    least, most = (engines, engines) if isinstance(engines, int) else engines
    dataset.map_batches(
        _Enricher,
        fn_constructor_args=(settings, template, columns, system, params),
        batch_size=batch_rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=settings.get("threads") or 1,
    ).write_parquet(output)


class _Enricher:
    """One engine, and the new columns of the batches that it is given."""

    def __init__(
        self, settings: dict[str, Any], template: Template, columns: Columns, system: str | None, params: dict[str, Any]
    ):
        self._llm, self._template, self._columns = LLM(**settings), template, columns
        form = StructuredOutputs(json=columns.schema, whitespace_pattern=WHITESPACE) if columns.schema else None
        self._params = SamplingParams(**params, structured_outputs=form)
        self._before = [] if system is None else [{"role": "system", "content": system}]

    def __call__(self, batch: pa.Table) -> pa.Table:
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
