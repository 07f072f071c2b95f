"""octavo pull: download a model."""

from pathlib import Path
from typing import Annotated

import typer

from octavo.terminal import printable


def register(app: typer.Typer) -> None:
    app.command()(pull)


def pull(
    model: Annotated[str, typer.Argument(help="A hub name, a directory, a .gguf file, or the alias smollm2.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Download a model, unless it is on this machine already. Prints its path and size."""
    from octavo.weights import resolve

    path = resolve(model, revision)
    typer.echo(f"{printable(str(path), lines=False)}  {_size(path) / 1e6:,.0f} MB")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
