"""octavo doctor: check whether Octavo works here, and say what to change."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.config import EngineConfig
from octavo.server.config import ServerConfig
from octavo.settings import Resolved
from octavo.terminal import printable

from .flags import Command, settings_flags

if TYPE_CHECKING:
    from octavo.doctor.finding import Finding

# Level: mark, word and color. The words make the marks readable without color, and where a terminal lacks the marks.
_LEVELS = {"ok": ("✓", "fine", "green"), "change": ("!", "change", "yellow"), "stop": ("✗", "stops", "red")}


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(cls=Command)(doctor)


@settings_flags(EngineConfig, ServerConfig, model_argument=False)
def doctor(
    settings: Resolved,
    given: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Also check whether this model loads, and what fits.", show_default=False
        ),
    ] = None,
) -> None:
    """Check whether Octavo works here: one line for each check, with what to change and how.

    Accepts the same flags, --config file and environment variables as octavo serve, loads no weights and downloads
    nothing. Exits with code 1 if something stops Octavo from working.
    """
    if given is not None:
        settings.values["model"] = given
    config, server = settings.build(EngineConfig), settings.build(ServerConfig)
    has_stop = False
    for finding in _findings(config, server, with_model="model" in settings.values):
        has_stop |= finding.level == "stop"
        mark, word, color = _LEVELS[finding.level]
        head = f"{mark} {word:<6}"
        if "NO_COLOR" not in os.environ:
            head = typer.style(head, fg=color)  # removed again by echo if stdout is not a terminal
        typer.echo(f"{head}  {finding.subject:<11}  {printable(finding.text, lines=False)}")
    if has_stop:
        raise typer.Exit(1)


def _findings(config: EngineConfig, server: ServerConfig, with_model: bool) -> "Iterator[Finding]":
    from octavo.doctor.host import check_host
    from octavo.doctor.installation import check_installation
    from octavo.doctor.model import check_model
    from octavo.doctor.places import check_places

    yield from check_installation()
    yield from check_host(config, server)
    yield from check_places(config, server)
    if with_model:
        yield from check_model(config)
