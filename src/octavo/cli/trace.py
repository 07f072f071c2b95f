"""octavo trace: show where the time of a traced server went, and its slowest requests."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(trace)


def trace(
    file: Annotated[Path, typer.Argument(help="File written with --trace.", show_default=False)],
    requests: Annotated[int, typer.Option(min=0, help="Number of slowest requests to show.")] = 10,
) -> None:
    """Show where the engines' time went, and the slowest requests with the reason, from a file of --trace.

    https://ui.perfetto.dev opens the same file as a timeline.
    """
    from octavo.tracing.reading import read_trace
    from octavo.tracing.report import print_report

    print_report(read_trace(file, requests))
