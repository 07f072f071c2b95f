"""octavo audit: check audit logs."""

from pathlib import Path
from typing import Annotated

import typer

from octavo.errors import ConfigError, OctavoError
from octavo.secret import SOURCES
from octavo.terminal import printable


class _Failed(OctavoError):
    """An audit log that is not as it was written."""


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    audit = typer.Typer(help="Check audit logs (docs/secrets.md).", no_args_is_help=True)
    audit.command()(verify)
    audit.command("hash")(hash_)
    app.add_typer(audit, name="audit")


_Key = Annotated[str, typer.Option("--audit-key", help=f"The key of the log: {SOURCES}.")]


def verify(
    files: Annotated[list[Path], typer.Argument(help="The files of one log, the oldest first.")], audit_key: _Key
) -> None:
    """Find lines of an audit log that were changed, removed, added or moved. Exit code 2 if there are any."""
    from octavo.server.audit.chain import ORIGIN, Keys
    from octavo.server.audit.chain import verify as verdict_of

    keys = Keys.of(_read_key(audit_key))
    try:
        verdict = verdict_of(files, keys)
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename} ({error.strerror})") from None
    if verdict.problems and not verdict.lines:
        raise _Failed("no line of the log was written with this key")
    for problem in verdict.problems:
        typer.echo(printable(problem, lines=False))
    if verdict.torn:
        typer.echo(f"{verdict.torn} torn by a kill of the server: what is left of a line that was being written")
    if verdict.first != ORIGIN:
        typer.echo(f"continues an older file, whose last mac must be {verdict.first}")
    end = "" if verdict.is_closed else "; no line says that the server ended: it runs, was killed, or lines are missing"
    typer.echo(f"{verdict.lines} authentic lines, the last mac is {verdict.last}{end}")
    if verdict.problems:
        raise _Failed(f"the log was tampered with: {len(verdict.problems)} problems")


def hash_(
    content: Annotated[Path, typer.Argument(help="A file with the body of a request, or the text of an answer.")],
    audit_key: _Key,
) -> None:
    """Print the hash that an audit log has of a request's body or of an answer."""
    from octavo.server.audit.chain import Keys

    try:
        typer.echo(Keys.of(_read_key(audit_key)).hash(content.read_bytes()))
    except OSError as error:
        raise ConfigError(f"cannot read {content} ({error.strerror})") from None


def _read_key(source: str) -> str:
    from octavo.secret import read_key

    key = read_key("audit_key", source)
    assert key is not None
    return key
