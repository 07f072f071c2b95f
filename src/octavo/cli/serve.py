"""octavo serve: an OpenAI-compatible HTTP server."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args, get_type_hints

import typer

from octavo.config import EngineConfig
from octavo.server.config import ServerConfig

from .engine_flags import engine_flags
from .expand import expand, flag

Result = TypeVar("Result")
_PANEL = "Server"


def server_flags(command: Callable[..., Result]) -> Callable[..., Result]:
    """Replace the parameter `server: ServerConfig` of a typer command by a flag for every field."""
    hints = get_type_hints(ServerConfig)
    flags = []
    for field in dataclasses.fields(ServerConfig):
        spelling = "--" + field.name.replace("_", "-")
        kind = (get_args(hints[field.name]) or (hints[field.name],))[0]
        if kind is bool:
            spelling += "/--no-" + spelling.removeprefix("--")
        flags.append(flag(field.name, kind, field.metadata["help"], spelling, default=field.default, panel=_PANEL))

    def config(values: Mapping[str, Any]) -> ServerConfig:
        return ServerConfig(**{name: value for name, value in values.items() if value is not None})

    return expand(command, "server", flags, config)


def register(app: typer.Typer) -> None:
    app.command()(serve)


@server_flags
@engine_flags
def serve(config: EngineConfig, server: ServerConfig) -> None:
    """Serve a model over HTTP, as OpenAI's API does."""
    from octavo.server.run import serve as run

    run(config, server)
