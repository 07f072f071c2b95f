"""octavo run-batch: answer a file of requests, one per line in the format of OpenAI's batches."""

from pathlib import Path
from typing import Annotated

import typer

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.settings import Resolved

from .flags import Command, settings_flags


def register(app: typer.Typer) -> None:
    app.command("run-batch", cls=Command)(run_batch)


@settings_flags(EngineConfig, model_argument=False)
def run_batch(
    settings: Resolved,
    source: Annotated[
        Path | None, typer.Argument(metavar="IN.jsonl", help="File of requests.", show_default=False)
    ] = None,
    target: Annotated[
        Path | None, typer.Argument(metavar="OUT.jsonl", help="File for the results.", show_default=False)
    ] = None,
    input_file: Annotated[Path | None, typer.Option("--input-file", "-i", help="The same as IN.jsonl.")] = None,
    output_file: Annotated[Path | None, typer.Option("--output-file", "-o", help="The same as OUT.jsonl.")] = None,
) -> None:
    """Answer a file of requests, one per line in the format of OpenAI's batches, in order.

    If OUT.jsonl exists, the run continues after its last complete line: run the same command again after an
    interruption. A request that fails gets a line with its error. See docs/batches.md.
    """
    source, target = source or input_file, target or output_file
    if source is None or target is None:
        raise ConfigError("name the input and the output: octavo run-batch IN.jsonl OUT.jsonl --model MODEL")
    from octavo.server.batch.command import run

    run(settings.build(EngineConfig), source, target)
