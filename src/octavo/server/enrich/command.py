"""octavo enrich: answer a prompt for each row of a table, and write the table with the answers in new columns."""

import contextlib
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import xxhash

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.params import SamplingParams, StructuredOutputs
from octavo.server.batch.lines import Row
from octavo.server.batch.local import LocalBatch
from octavo.server.batch.progress import say, summary
from octavo.server.batch.results import OtherResults, ResultFile

from .answers import read_answer
from .columns import Columns
from .tables import Table, check_format, open_writer
from .template import Template

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
WHITESPACE = " ?"  # between the parts of JSON; small models may fill their answers with more


@dataclass(frozen=True)
class Enrichment:
    """A table to be enriched.

    Args:
        target: the output, which must not exist.
        system: the system message of every row.

    Raises ConfigError if the output cannot be written, or would have two columns of the same name.
    """

    table: Table
    template: Template
    columns: Columns
    target: Path
    system: str | None
    params: SamplingParams

    def __post_init__(self) -> None:
        check_format(self.target)
        if self.target.exists():
            raise ConfigError(f"{self.target} exists: delete it, or choose another --output")
        names = [*self.table.schema.names, *(field.name for field in self.columns.all_fields)]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"there would be two columns {name!r}: choose other names with --column and --error-column, or "
                    "rename the property of the schema"
                )

    @property
    def answers(self) -> Path:
        """Return the path of the file of answers, from which an interrupted run is continued."""
        return self.target.with_name(f"{self.target.name}.answers.jsonl")

    def rows(self, llm: AsyncLLM) -> Iterator[Row]:
        """Yield the requests of the table's rows. A request is a chat if the model has a chat template.

        The ids are the numbers of the rows with a hash of the request, so that answers to other requests are detected.
        Raises InvalidRequest for a schema that cannot be enforced.
        """
        common = msgspec.to_builtins(self.params)
        common |= {"temperature": self.params.temperature, "max_tokens": self.params.max_tokens}
        if schema := self.columns.schema:
            form = StructuredOutputs(json=schema, whitespace_pattern=WHITESPACE)
            llm.tokenizer.grammars.matcher(form)
            common["structured_outputs"] = msgspec.to_builtins(form)
        is_chat = llm.tokenizer.has_chat_template
        if self.system is not None and not is_chat:
            raise ConfigError("the model has no chat template, so there is no --system message: put it into --prompt")
        return self._rows(is_chat, common)

    def _rows(self, is_chat: bool, common: dict[str, Any]) -> Iterator[Row]:
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompts = (
            self.template.render(record)
            for batch in self.table.read()
            for record in batch.select(self.template.columns).to_pylist()
        )
        for number, prompt in enumerate(prompts, 1):
            body = {"messages": [*before, {"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
            content = msgspec.json.encode(body | common)
            id = f"{number}-{xxhash.xxh3_64_hexdigest(content)}"
            yield Row(id, CHAT if is_chat else COMPLETION, content)


def run(config: EngineConfig, job: Enrichment) -> None:
    """Answer the prompts of all rows, and write the output.

    The answers are collected in a file beside the output, with which an interrupted run continues. The output appears
    when it is complete. Raises errors of the files and of the model; KeyboardInterrupt after Ctrl-C or SIGTERM.
    """
    with contextlib.closing(ResultFile(job.answers)) as results, _removed_if_empty(job.answers):
        batch = LocalBatch(config, results, job.table.num_rows, "rows")

        def open_rows(llm: AsyncLLM) -> Iterator[Row]:
            rows = job.rows(llm)
            try:
                results.resume(rows)
            except OtherResults:
                raise ConfigError(
                    f"{job.answers} is of a run with another table, prompt, schema or options: delete it to start anew"
                ) from None
            return rows

        batch.run(open_rows)
        errors = _write(job)
    job.answers.unlink(missing_ok=True)
    say(f"{summary(results.counts, 'rows')}: {job.target}")
    if unfit := errors - results.counts.failed:
        say(f"{unfit} answers do not fit the schema; see the column {job.columns.error}")


@contextlib.contextmanager
def _removed_if_empty(path: Path) -> Generator[None]:
    """Remove the file afterwards if nothing was written, so that a command that is refused leaves nothing behind."""
    try:
        yield
    finally:
        if not path.stat().st_size:
            path.unlink()


def _write(job: Enrichment) -> int:
    """Write the table with the new columns. Return the number of rows with errors."""
    errors = 0
    schema = pa.schema([*job.table.schema, *job.columns.all_fields])
    incomplete = job.target.with_name(f"{job.target.name}.incomplete")
    try:
        with (
            contextlib.closing(open_writer(incomplete, job.target.suffix, schema)) as writer,
            job.answers.open("rb") as lines,
        ):
            for batch in job.table.read():
                answers = [read_answer(line) for line in itertools.islice(lines, batch.num_rows)]
                columns = [*batch.columns, *job.columns.arrays(answers)]
                errors += len(batch) - columns[-1].null_count
                writer.write(pa.RecordBatch.from_arrays(columns, schema=schema))
    except OSError as error:
        raise ConfigError(f"cannot write {incomplete}: {error.strerror}") from None
    incomplete.replace(job.target)
    return errors
