"""octavo config: print every setting, its value and the origin of the value."""

import json
from typing import Annotated

import typer

from octavo.config import EngineConfig
from octavo.server.config import ServerConfig
from octavo.settings import MASK, Resolved, format_value, is_secret, settings_of

from .flags import PANELS, Command, settings_flags


def register(app: typer.Typer) -> None:
    app.command("config", cls=Command)(show)


@settings_flags(EngineConfig, ServerConfig)
def show(
    settings: Resolved,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: name -> value, source and help.")] = False,
) -> None:
    """Print every setting of octavo serve, its value, and where the value comes from.

    Accepts the same flags, --config file and environment variables as octavo serve. Loads no model.
    """
    built: dict[type, object] = {kind: settings.build(kind) for kind in PANELS}
    if as_json:
        typer.echo(
            json.dumps(
                {name: _entry(settings, kind, built[kind], name) for kind in built for name in settings_of(kind)},
                indent=2,
            )
        )
        return
    from rich.table import Table

    from octavo.terminal import console, printable

    table = Table("Setting", "Value", "From", box=None, pad_edge=False)
    for kind, config in built.items():
        table.add_row(f"{PANELS[kind]}:")
        for name in settings_of(kind):
            value = printable(format_value(kind, name, _shown(config, name)), lines=False)
            table.add_row(f"  {name}", value, printable(settings.origins.get(name, "default"), lines=False))
    console().print(table)


def _entry(settings: Resolved, kind: type, config: object, name: str) -> dict[str, object]:
    return {
        "value": _shown(config, name),
        "from": settings.origins.get(name, "default"),
        "help": settings_of(kind)[name].metadata["help"],
    }


def _shown(config: object, name: str) -> object:
    """Return a setting's value; a secret one is masked."""
    value = getattr(config, name)
    return MASK if is_secret(name) and value is not None else value
