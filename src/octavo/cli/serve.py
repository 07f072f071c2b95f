"""octavo serve: an OpenAI-compatible HTTP server."""

import os

import typer

from octavo.config import EngineConfig
from octavo.server.config import ServerConfig
from octavo.settings import Resolved

from .flags import Command, settings_flags


def register(app: typer.Typer) -> None:
    app.command(cls=Command)(serve)


@settings_flags(EngineConfig, ServerConfig)
def serve(settings: Resolved) -> None:
    """Serve a model over HTTP with OpenAI's API.

    Every setting is also a key of a --config file and an environment variable OCTAVO_...; see octavo config. vLLM's
    flags are accepted too.
    """
    engine, server = settings.build(EngineConfig), settings.build(ServerConfig)
    if os.environ.get("VLLM_API_KEY"):
        typer.echo(
            "octavo: VLLM_API_KEY is set, but this version checks no keys: anyone who can connect is served", err=True
        )
    from octavo.server.run import serve as run

    run(engine, server)
