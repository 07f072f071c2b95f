"""octavo enrich: fill new columns of a table with a model's answers."""

from pathlib import Path
from typing import Annotated

import typer

from octavo.config import EngineConfig
from octavo.params import SamplingParams
from octavo.settings import Resolved

from .flags import Command, sampling_flags, settings_flags


def register(app: typer.Typer) -> None:
    app.command(cls=Command)(enrich)


@settings_flags(EngineConfig, model_argument=False)
@sampling_flags(max_tokens=256, temperature=0.0)
def enrich(
    params: SamplingParams,
    settings: Resolved,
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Table to enrich: a .csv, .jsonl or .parquet file.")],
    prompt: Annotated[
        str, typer.Option("--prompt", help="Prompt of a row, such as 'Sentiment of: {text}' for the column text.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File for the enriched table: .csv, .jsonl or .parquet.")
    ],
    schema: Annotated[
        Path | None, typer.Option("--schema", help="JSON schema of the answers; each property becomes a column.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="Instructions for the model: the system message.")
    ] = None,
    column: Annotated[
        str, typer.Option("--column", help="Column for the answers' text, without --schema. Default: answer.")
    ] = "answer",
    error_column: Annotated[
        str, typer.Option("--error-column", help="Column for what failed in a row, null otherwise. Default: error.")
    ] = "error",
) -> None:
    """Answer a prompt for each row of a table, and write the table with the answers in new columns.

    Run the same command again after an interruption: it continues where it stopped. A row that fails has an error, and
    the others go on. See docs/enrich.md.
    """
    from octavo.server.enrich.columns import read_schema, text_column
    from octavo.server.enrich.command import Enrichment, run
    from octavo.server.enrich.tables import check_format, open_table
    from octavo.server.enrich.template import Template

    check_format(output)
    columns = read_schema(schema, error_column) if schema else text_column(column, error_column)
    source = open_table(table)
    template = Template(prompt, source.schema.names)
    run(settings.build(EngineConfig), Enrichment(source, template, columns, output, system, params))
