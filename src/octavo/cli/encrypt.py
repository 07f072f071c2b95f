"""octavo encrypt: write an encrypted copy of a model, which is decrypted only into memory."""

from pathlib import Path
from typing import Annotated

import typer

from octavo.errors import ConfigError
from octavo.terminal import printable

from .output_folder import complete_or_absent, output_folder


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(encrypt)


def encrypt(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name, or the alias smollm2.")],
    recipient: Annotated[
        list[str],
        typer.Option(
            help="Public key of whoever may load the model: age1..., or the content of an SSH .pub file. Repeat it for "
            "several."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The folder to write; by default MODEL.age.", show_default=False),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Write an encrypted copy of a model, which every command accepts with --model-identity (docs/secrets.md)."""
    from octavo.formats.files import MANIFEST
    from octavo.frontend.progress import loading_bar
    from octavo.weights import resolve
    from octavo.weights.encrypting import encrypt_model

    path = resolve(model, revision)
    if (path / MANIFEST).exists():
        raise ConfigError(f"{path} is encrypted already; encrypt the model that it was made from")
    given = Path(model).expanduser()
    folder = given.absolute().parent if given.exists() else Path()
    target = output_folder(output or folder / f"{given.name}.age")
    if target.exists():
        raise ConfigError(f"{target} exists; choose another name: --output FOLDER")
    with complete_or_absent(target) as written, loading_bar("encrypting") as progress:
        size, left_out = encrypt_model(path, written, recipient, progress)
    if left_out:
        typer.echo(f"left out, since no model needs them: {printable(', '.join(left_out), lines=False)}")
    typer.echo(f"{target}  {size / 1e6:,.0f} MB")
