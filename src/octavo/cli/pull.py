"""octavo pull: download a model's files."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from octavo.terminal import printable


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(pull)


def pull(
    model: Annotated[str, typer.Argument(help="A hub name, a directory, a .gguf file, or the alias smollm2.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Download a model unless it is already on this machine, and print its path and size."""
    from octavo.weights import resolve

    path = resolve(model, revision)
    typer.echo(f"{printable(str(path), lines=False)}  {_size(path) / 1e6:,.0f} MB")


def _size(path: Path) -> int:
    """Return the size in bytes of a file, or of all readable files in a directory."""
    total = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with contextlib.suppress(OSError):
            if file.is_file():
                total += file.stat().st_size
    return total
